"""Fixtures of these tests."""

from tests.tokenizer_files import hf_folder

__all__ = ["hf_folder"]
