"""Recall samples as tokens: exact lengths, known depths, and the answers' own tokens.

Number ``i`` of a task is the same story at every length and depth: the same keys and values, only
farther apart. So depths and lengths are compared, and models, on the same questions.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lctw_megatron.data.batch import IGNORE, Sample
from lctw_megatron.data.tokenizers import Tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.haystack import Sentences, Stream, encoded, fill_units, open_haystack
from lctw_megatron.evaluation.part_encoder import PartEncoder
from lctw_megatron.evaluation.recall_tasks import BY_LINES, TASKS, WITHOUT_DEPTH, Story

WINDOW = 1024
"""Tokens of the short context, unless the run has a window of its own."""


@dataclass(frozen=True)
class RecallSample:
    """One question at the end of a long text."""

    task: str
    length: int
    depth: float | None
    """Where the first needed piece stands: 0 at the beginning, 1 right before the question."""
    number: int
    ids: np.ndarray
    """int32 [length + 1]: what the model reads and, one further, what it must predict."""
    answers: list[np.ndarray]
    """Of each answer the places of its tokens in ``ids``."""
    answer_texts: list[str]
    tail: int
    """Tokens of the question and its answers, at the end of ``ids``."""

    def whole(self) -> Sample:
        """All of it; targets are the answers' tokens."""
        return self._cut(self.ids)

    def short(self, window: int, bos_id: int | None) -> Sample:
        """Only the last ``window`` inputs, the first of them ``bos_id`` if there is one. InputError
        if question and answers do not fit."""
        _check_window(window, self.task, self.tail)
        ids = self.ids[-window - 1 :].copy()
        if bos_id is not None:
            ids[0] = bos_id
        return self._cut(ids)

    def _cut(self, ids: np.ndarray) -> Sample:
        places = np.concatenate(self.answers) - (len(self.ids) - len(ids))
        labels = np.full(len(ids) - 1, IGNORE, dtype=np.int64)
        labels[places - 1] = ids[places]
        bounds = np.array([0, len(labels)], dtype=np.int32)
        return Sample(ids[:-1].astype(np.int64), labels, None, bounds, np.zeros(1, dtype=np.int64))

    @cached_property
    def digest(self) -> bytes:
        places = np.concatenate(self.answers).astype(np.int64)
        return hashlib.blake2b(self.ids.tobytes() + places.tobytes(), digest_size=8).digest()


class _Parts(NamedTuple):
    """A sample as tokens, before its filler: int32 ids."""

    story: Story
    in_haystack: bool
    """Whether the filler is the haystack's, not the story's own."""
    first: np.ndarray
    opening: np.ndarray
    tail: np.ndarray
    pieces: list[np.ndarray]
    room: int
    """Tokens of the filler."""


class SampleMaker:
    """Makes samples for one tokenizer and one haystack."""

    def __init__(
        self, tokenizer: Tokenizer, haystack: str | None, seed: int, vocab_size: int
    ) -> None:
        """haystack: see ``open_haystack``. vocab_size: the model's. InputError for a haystack that
        does not fit, or a tokenizer that loses the words of the samples."""
        self.seed = seed
        self._vocab_size = vocab_size
        self.bos_id = tokenizer.identity.first_id
        self._tokenizer = tokenizer
        self._encode = PartEncoder(tokenizer)
        self._sentences = Sentences(self._encode)
        self.haystack = open_haystack(haystack, tokenizer, self._encode, vocab_size)

    def check(self, task: str, length: int, samples: int, window: int | None = None) -> None:
        """InputError if one of so many samples cannot be made, or asked in ``window`` tokens: they
        differ by some. Only the first is made, as long ones take a while."""
        self(task, length, 0.5, 0)
        for number in range(samples):
            parts = self._parts(self._rng(task, number), task, length, 0.5)
            if parts.in_haystack:
                self.haystack.check(parts.room)
            if window is not None:
                _check_window(window, task, len(parts.tail))

    def __call__(self, task: str, length: int, depth: float | None, number: int) -> RecallSample:
        """Sample ``number`` of ``task``. InputError if ``length`` or the haystack is too short."""
        rng = self._rng(task, number)
        story, in_haystack, first, opening, tail, pieces, room = self._parts(
            rng, task, length, 0.0 if depth is None else depth
        )
        if in_haystack:
            filler = self.haystack.fill(room, rng, task in BY_LINES)
        else:
            assert story.filler is not None
            before = self._sentences if story.opening else None
            filler = fill_units(encoded(story.filler, self._encode), room, before)
        parts, at = [first], 0
        places = [0.0, *(place for place, _ in story.pieces)]
        joints = [_nearest(filler.joints, place * room) for place in places]
        for joint, ids in sorted(
            zip(joints, [opening, *pieces], strict=True), key=lambda item: item[0]
        ):
            parts += [filler.ids[at:joint], ids]
            at = joint
        parts += [filler.ids[at:], tail]
        ids = np.concatenate(parts).astype(np.int32)
        assert len(ids) == length + 1
        self._check_vocabulary(ids)
        answers, texts = self._answers(story.tail, tail, length + 1)
        return RecallSample(task, length, depth, number, ids, answers, texts, len(tail))

    def _rng(self, task: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(task.encode()), number])

    def _parts(self, rng: np.random.Generator, task: str, length: int, depth: float) -> "_Parts":
        story = TASKS[task](rng, depth)
        tail_text = "".join(text for text, _ in story.tail)
        # Code is hidden in the user's own, where there is any, on lines of its own.
        in_code = task in BY_LINES and isinstance(self.haystack, Stream)
        end = "\n" if in_code else ""
        texts = [story.opening, tail_text, *(text + end for _, text in story.pieces)]
        opening, tail, *pieces = self._encode(texts)
        first = np.array([] if self.bos_id is None else [self.bos_id], dtype=np.int32)
        room = length + 1 - sum(map(len, (first, opening, tail, *pieces)))
        if room < 0:
            raise InputError(
                f"a length of {length} tokens: a sample of task {task} needs {length - room} "
                "tokens of this tokenizer without any text around it; give a greater length"
            )
        self._check_vocabulary(np.concatenate([opening, tail, *pieces]))
        in_haystack = story.filler is None or in_code
        return _Parts(story, in_haystack, first, opening, tail, pieces, room)

    def _check_vocabulary(self, ids: np.ndarray) -> None:
        if (largest := int(ids.max())) >= self._vocab_size:
            raise InputError(
                f"tokenizer {self._tokenizer.identity.path}: token {largest} of a sample is beyond "
                f"the model's vocabulary of {self._vocab_size}; is it the model's tokenizer?"
            )

    def text(self, sample: RecallSample) -> str:
        """What a sample says, without BOS."""
        return self._tokenizer.decode(sample.ids)

    def _answers(
        self, parts: Sequence[tuple[str, bool]], tail: np.ndarray, end: int
    ) -> tuple[list[np.ndarray], list[str]]:
        spans, texts, at = [], [], 0
        for text, is_answer in parts:
            if is_answer:
                spans.append((at, at + len(text)))
                texts.append(text)
            at += len(text)
        return [span + end - len(tail) for span in self._encode.spans(tail, spans)], texts


def _check_window(window: int, task: str, tail: int) -> None:
    if tail > window:
        raise InputError(
            f"--window {window}: the question and answers of task {task} alone take {tail} tokens; "
            "give a greater one"
        )


def _nearest(joints: np.ndarray, place: float) -> int:
    return int(joints[np.abs(joints - place).argmin()])


def depths_of(task: str, depths: Sequence[float]) -> list[float | None]:
    """A task without depth has one place, None."""
    return [None] if task in WITHOUT_DEPTH else list(depths)


def samples_of(
    maker: SampleMaker, tasks: Sequence[str], length: int, depths: Sequence[float], samples: int
) -> Iterator[RecallSample]:
    """Every task at every depth, ``samples`` each."""
    for task in tasks:
        for depth in depths_of(task, depths):
            for number in range(samples):
                yield maker(task, length, depth, number)
