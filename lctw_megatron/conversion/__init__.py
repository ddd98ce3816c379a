"""Checkpoints to and from Hugging Face and Megatron-LM."""
