"""The text of each token, so that the texts side by side are the document's."""

from collections.abc import Callable, Sequence

import numpy as np

from lctw_megatron.data.tokenizers import REPLACEMENT, Tokenizer


class TokenTexts:
    """Texts of token ids under one tokenizer; remembers what it has looked up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """One text a token: " word", "ing", "\\n", "</s>".

        Where tokens hold parts of a character, the last of them gets the character and the others
        are empty.
        """
        numbers = np.asarray(ids).tolist()
        texts = [self._text(id) for id in numbers]
        if REPLACEMENT not in "".join(texts):  # nearly always
            return texts
        begin = 0
        while begin < len(texts):
            end = begin
            while end < len(texts) and REPLACEMENT in texts[end]:
                end += 1
            if end > begin:
                texts[begin:end] = self._characters(numbers[begin:end])
            begin = max(end, begin + 1)
        return texts

    def which(self, ids: np.ndarray, *tests: Callable[[str], bool]) -> np.ndarray:
        """bool [tests, tokens]: whether each one's text passes. Asks once about an id, so that 32k
        tokens take milliseconds."""
        kinds, kind_of = np.unique(ids, return_inverse=True)
        texts = [self._text(id) for id in kinds.tolist()]
        asked = [*tests, lambda text: REPLACEMENT in text]
        answers = np.array([[test(text) for text in texts] for test in asked], dtype=bool)
        *found, partial = answers[:, kind_of]
        for begin, end in np.flatnonzero(np.diff(partial, prepend=0, append=0)).reshape(-1, 2):
            characters = self._characters(ids[begin:end].tolist())
            for row, test in zip(found, tests, strict=True):
                row[begin:end] = [test(text) for text in characters]
        return np.array(found)

    def _characters(self, ids: list[int]) -> list[str]:
        """Texts of a run of tokens that hold parts of characters."""
        texts = [""] * len(ids)
        start = 0
        for end in range(1, len(ids) + 1):
            text = self._tokenizer.decode(ids[start:end])
            if end == len(ids) or not text.endswith(REPLACEMENT):
                texts[end - 1], start = text, end
        return texts

    def _text(self, id: int) -> str:
        if id not in self._known:
            try:
                self._known[id] = self._tokenizer.token_text(id)
            except IndexError:  # data of another tokenizer may still be looked at
                self._known[id] = f"<id {id}>"
        return self._known[id]
