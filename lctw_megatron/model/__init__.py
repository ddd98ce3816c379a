"""The GPT model, its per-token loss and its attention."""
