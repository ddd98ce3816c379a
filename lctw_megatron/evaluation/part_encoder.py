"""Texts as the tokens that they are inside a longer text, and where in them a character lies."""

from collections.abc import Sequence

import numpy as np

from lctw_megatron.data.token_text import TokenTexts
from lctw_megatron.data.tokenizers import Tokenizer
from lctw_megatron.errors import InputError

_BEFORE = "a"
"""What a text is taken to follow, since SentencePiece would put a space before it. Not a full stop,
which some tokenizers join with a newline."""


class PartEncoder:
    """Encodes the parts of a text of which only some are known yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)
        self._before = tokenizer.encode_batch([_BEFORE])[0].tolist()

    def __call__(self, parts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each part, int32 [tokens].

        Raises InputError if the ids do not give back the part: a vocabulary that lacks its words or
        digits, or a tokenizer that changes them.
        """
        skip = len(self._before)
        encoded = self._tokenizer.encode_batch([_BEFORE + part for part in parts])
        for part, ids in zip(parts, encoded, strict=True):
            found = "".join(self.texts(ids[skip:]))
            if ids[:skip].tolist() != self._before or found != part:
                raise InputError(
                    f"tokenizer {self._tokenizer.identity.path}: {part[:60]!r} comes back from its "
                    f"tokens as {found[:60]!r}, so answers cannot be told; its vocabulary lacks "
                    "what the samples are made of: leave out the task, or use another tokenizer"
                )
        return [ids[skip:] for ids in encoded]

    def spans(self, ids: np.ndarray, characters: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Of each stretch of characters (first, end) of a part's text: the places in ``ids`` of all
        tokens that hold any of it."""
        ends = np.cumsum([len(text) for text in self.texts(ids)])
        starts = np.concatenate([[0], ends[:-1]])
        # A token without text is a part of the character that the next one ends.
        return [np.flatnonzero((starts < end) & (ends > first)) for first, end in characters]
