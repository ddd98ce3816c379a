"""What hidden facts are hidden in: repeated sentences, a text file or a token dataset.

A haystack gives filler of an exact number of tokens, and says where in it something may be put.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.data.tokenizers import Tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.part_encoder import PartEncoder
from lctw_megatron.evaluation.recall_tasks import SENTENCES
from lctw_megatron.platform.world import first_rank_decides

SENTENCE_ENDS = (".", "!", "?", "\n")
_BATCH = 64


class Filler(NamedTuple):
    """Tokens that fill a sample."""

    ids: np.ndarray
    """int32 [room]"""
    joints: np.ndarray
    """int64, ascending: places before which something may be put, 0 to room."""


class Haystack(Protocol):
    """Where filler comes from."""

    name: str
    identity: str
    """Changes with the contents."""

    def check(self, room: int) -> None:
        """InputError if it has not so much."""
        ...

    def fill(self, room: int, rng: np.random.Generator, by_lines: bool) -> Filler:
        """by_lines: joints between lines, where there are any, instead of between sentences."""
        ...


class Sentences:
    """A few sentences again and again: as long as it must be."""

    name = identity = "sentences"

    def __init__(self, encode: PartEncoder) -> None:
        self._units = encode(SENTENCES)

    def check(self, room: int) -> None:
        pass

    def fill(self, room: int, rng: np.random.Generator, by_lines: bool) -> Filler:
        first = int(rng.integers(len(self._units)))
        return fill_units(islice(cycle(self._units), first, None), room)

    def end(self, room: int) -> np.ndarray:
        """The last ``room`` tokens of some sentences."""
        all_ids = np.concatenate(self._units)
        return np.tile(all_ids, 1 + room // len(all_ids))[-room or len(all_ids) :][:room]


class Stream:
    """Documents as they are: every sample a stretch of one of them."""

    def __init__(
        self,
        name: str,
        identity: str,
        documents: Sequence[np.ndarray] | TokenDataset,
        lengths: np.ndarray,
        first: int,
        encode: PartEncoder,
    ) -> None:
        """lengths int64 [documents]: the tokens of each that may be used, from ``first`` on."""
        self.name, self.identity = name, identity
        self._documents, self._lengths, self._first = documents, lengths, first
        self._longest = int(lengths.max(initial=0))
        self._texts = encode.texts

    def check(self, room: int) -> None:
        if self._longest < room:
            raise InputError(
                f"--haystack {self.name}: its longest document has {self._longest} "
                f"tokens, but a sample takes {room} of one; give longer documents or smaller "
                "--lengths, or leave --haystack out (repeated sentences are always long enough)"
            )

    def fill(self, room: int, rng: np.random.Generator, by_lines: bool) -> Filler:
        self.check(room)
        document = int(rng.choice(np.flatnonzero(self._lengths >= room)))
        begin = self._first + int(rng.integers(self._lengths[document] - room + 1))
        ids, joints = self._read(document, begin, room, by_lines)
        # Better an end of a sentence before the question too, if the document has so much before.
        if len(joints) and 0 < (behind := room - int(joints[-1])) <= begin - self._first:
            ids, joints = self._read(document, begin - behind, room, by_lines)
        return Filler(ids, joints if len(joints) else np.arange(room + 1))

    def _read(
        self, document: int, begin: int, room: int, by_lines: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(self._documents[document][begin : begin + room], dtype=np.int32)
        ends = ("\n",) if by_lines else SENTENCE_ENDS
        last, first = self._texts.which(
            ids, lambda text: text.endswith(ends), lambda text: text.startswith("\n")
        )
        last[:-1] |= first[1:]
        return ids, np.flatnonzero(last) + 1


def open_haystack(
    path: str | None, tokenizer: Tokenizer, encode: PartEncoder, vocab_size: int
) -> Haystack:
    """None: repeated sentences; a prefix of a token dataset; or a text file. vocab_size: the
    model's. InputError, also for a token that the model lacks, which samples may meet late. All
    ranks call it."""
    if path is None:
        return Sentences(encode)
    if first_rank_decides(Path(f"{path}.idx").is_file):
        dataset = TokenDataset(path)
        theirs, ours = dataset.manifest.tokenizer.digest, tokenizer.identity.digest
        if theirs != ours:
            raise InputError(
                f"--haystack {path}: tokenised with {dataset.manifest.tokenizer.path} (digest "
                f"{theirs}), but the checkpoint's tokenizer is {ours}; give a text file instead"
            )
        dataset.check_fits(vocab_size, "the checkpoint")
        known = dataset.manifest.tokenizer  # which says what lies around these documents
        around = int(known.add_bos) + int(known.add_eos)
        lengths = np.asarray(dataset.lengths, dtype=np.int64) - around
        return Stream(path, dataset.fingerprint, dataset, lengths, int(known.add_bos), encode)
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"--haystack {path}: neither a text file nor a token dataset ({path}.idx)"
        ) from None
    except IsADirectoryError:
        raise InputError(
            f"--haystack {path}: is a folder, not a text file or the prefix of a token dataset"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"--haystack {path}: not a text file in UTF-8 ({error})") from None
    ids = tokenizer.encode_batch([text])[0]
    if (largest := int(ids.max(initial=0))) >= vocab_size:
        raise InputError(
            f"--haystack {path}: holds token id {largest}, but the checkpoint has a vocabulary of "
            f"{vocab_size} (ids 0 to {vocab_size - 1}); leave its text out of the file"
        )
    identity = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Stream(path, identity, [ids], np.array([len(ids)]), 0, encode)


def encoded(units: Iterator[str], encode: PartEncoder) -> Iterator[np.ndarray]:
    """The ids of endless texts, many at a time."""
    while True:
        yield from encode(list(islice(units, _BATCH)))


def fill_units(units: Iterator[np.ndarray], room: int, before: Sentences | None = None) -> Filler:
    """Whole ``units`` as long as they fit. So that the length is exact, the end of the next one
    stands before them, or the end of sentences; the first joint is behind it."""
    parts: list[np.ndarray] = []
    left = room
    for ids in units:
        if len(ids) > left:
            rest = before.end(left) if before else ids[len(ids) - left :]
            return Filler(np.concatenate([rest, *parts]), np.cumsum([left, *map(len, parts)]))
        parts.append(ids)
        left -= len(ids)
    raise AssertionError("units are endless")
