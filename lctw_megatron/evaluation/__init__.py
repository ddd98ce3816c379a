"""What a model can do: held-out losses taken apart, recall, public benchmarks."""
