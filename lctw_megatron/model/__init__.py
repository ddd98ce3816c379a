"""The model, its per-token loss and its attention; and checkpoints of it."""
