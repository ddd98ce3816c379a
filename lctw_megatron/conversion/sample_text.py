"""Tokens to compare models on: real text that every machine has, or the user's."""

from pathlib import Path

import torch
from torch import Tensor

from lctw_megatron.data.tokenizer_files import has_tokenizer
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError


def sample_text(text: Path | None, length: int) -> str:
    """Enough of ``text`` for ``length`` tokens; None: of the language reference that Python's
    `help()` shows, about 700 kB of English."""
    if text is None:
        from pydoc_data.topics import topics

        content = "\n\n".join(topics.values())
    else:
        content = text.read_text(errors="replace")
    # A token is seldom longer than a few characters; no need to encode all of a long text.
    return content[: 32 * length]


def text_tokens(folder: Path, text: Path | None, length: int) -> Tensor:
    """The first ``length`` tokens, int64 [1, length], of a text in the tokenizer of ``folder``."""
    if not has_tokenizer(folder):
        raise InputError(
            f"{folder}: has no tokenizer to turn text into tokens; give token ids with --tokens"
        )
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_documents([sample_text(text, length)])[0][:length]
    return _checked(torch.from_numpy(ids).long(), str(text or "Python's help texts"), length)


def file_tokens(path: Path, length: int) -> Tensor:
    """The first ``length`` ids, int64 [1, length], of a file of numbers between white space."""
    try:
        ids = torch.tensor([int(word) for word in path.read_text().split()[:length]])
    except (ValueError, OverflowError, RuntimeError):  # no text, no number, too large a one
        raise InputError(f"{path}: expected token ids between white space") from None
    return _checked(ids, str(path), length)


def _checked(ids: Tensor, source: str, length: int) -> Tensor:
    if ids.numel() < length:
        raise InputError(f"{source}: only {ids.numel()} tokens; lower --length, which is {length}")
    return ids[None]
