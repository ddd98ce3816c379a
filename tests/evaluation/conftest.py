"""Fixtures of these tests."""

from tests.tokenizer_files import hf_folder, sentencepiece_model

__all__ = ["hf_folder", "sentencepiece_model"]
