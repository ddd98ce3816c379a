"""Fixtures of these tests."""

from tests.data.small_loader import folder
from tests.tokenizer_files import folder_with, hf_folder, sentencepiece_model

__all__ = ["folder", "folder_with", "hf_folder", "sentencepiece_model"]
