"""One float32 per token beside a token dataset: PREFIX.<name>.bin, .idx and .json.

Token t >= 1 of a document is a target and its loss is stored at t; index 0, and every target that
was not scored, is NaN. The .idx holds the token dataset's lengths.

Sixteen bits would not do: with the best of three encodings (benchmarks/sixteen_bits.py)
13 % of the `dense` weights of a novel under SmolLM2-135M change by more than 0.001, up to 0.0012;
with float16's bits 63 %, and a target near the threshold of `sparse` gains or loses its whole
weight.
"""

import bisect
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from lctw_megatron.atomic import atomic_file
from lctw_megatron.closing import Closing
from lctw_megatron.data.batch import usable_scores
from lctw_megatron.data.fingerprint import content_fingerprint, sample_digest
from lctw_megatron.data.indexed_array import (
    BLOCK_BYTES,
    IndexedArrayReader,
    data_path,
    index_path,
    write_index,
)
from lctw_megatron.data.manifest import (
    SidecarManifest,
    manifest_path,
    read_manifest,
    remove_manifest,
    write_manifest,
)
from lctw_megatron.data.sequences import SequenceIndex
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError

FLOAT32 = np.dtype("<f4")
_SAMPLED_LENGTHS = 64


def sidecar_prefix(dataset_prefix: str, name: str) -> str:
    return f"{dataset_prefix}.{name}"


class Sidecar(IndexedArrayReader):
    """The values of a token dataset's sidecar, memory-mapped, checked against the dataset.

    ``sidecar.get(i, offset, length)`` float32 [length] aligns with ``dataset.get(i, offset,
    length)``. Opening takes constant time; ``verify`` reads everything. InputError names both
    sides of whatever does not fit.
    """

    def __init__(self, dataset: TokenDataset, name: str = "short_loss") -> None:
        self.dataset = dataset
        self.name = name
        prefix = sidecar_prefix(dataset.prefix, name)
        if not os.path.exists(index_path(prefix)):
            raise InputError(
                f"{index_path(prefix)}: no such file; score the data with: python tools/score.py "
                f"--data {dataset.prefix} --name {name} ..."
            )
        super().__init__(prefix)
        if self.dtype != FLOAT32:
            raise InputError(
                f"{index_path(prefix)}: holds {self.dtype.name} values, a sidecar holds float32"
            )
        try:
            self.manifest = read_manifest(prefix, SidecarManifest)
        except FileNotFoundError:
            raise InputError(
                f"{manifest_path(prefix)}: no such file, so the sidecar is not finished; run "
                f"tools/score.py again"
            ) from None
        self._check_dataset()

    def usable(self, document: int, offset: int, length: int) -> np.ndarray:
        """float32 [length], a copy: the short losses of the targets of a piece with the inputs
        [offset, offset + length) of a document, without those that say nothing (``usable_scores``).

        InputError for an infinite one.
        """
        losses = self.get(document, offset + 1, length)
        if np.isinf(losses).any():
            wrong = int(np.argmax(np.isinf(losses)))
            raise InputError(
                f"{self.prefix}: the short loss of token {offset + 1 + wrong} of document "
                f"{document} is {losses[wrong]}, expected a finite number or NaN: the sidecar is "
                "damaged or its scorer overflowed; score again"
            )
        keep_first_window = bool(self._keeps_first_window(np.asarray(offset)))
        return usable_scores(losses, self.manifest.window, keep_first_window)

    def usable_share(self, index: SequenceIndex) -> float:
        """Share of the targets of ``index`` that ``usable`` leaves, were all of them scored."""
        lengths = np.asarray(index.piece_length, dtype=np.int64)
        left = np.maximum(lengths - (self.manifest.window - 1), 0)
        kept = np.where(self._keeps_first_window(np.asarray(index.piece_offset)), lengths, left)
        return int(kept.sum()) / max(int(lengths.sum()), 1)

    def _keeps_first_window(self, offsets: np.ndarray) -> np.ndarray:
        """Whether pieces that begin there keep the scores of their first window. Only where the
        scorer's windows begin with the piece has it been scored on purpose; elsewhere those values
        come from windows of text before the piece."""
        begins_with_windows = (offsets == 0) | (self.manifest.sequence_length is not None)
        return begins_with_windows & self.manifest.score_first_window

    def check(
        self,
        window: int | None = None,
        stride: int | None = None,
        sequence_length: int | None = None,
        packing: str | None = None,
    ) -> None:
        """InputError unless the sidecar was scored with this window and stride (None: any) and
        serves sequences of this length and packing.

        Windows that restart only at documents serve any sequence length. Windows that also
        restart at multiples of S serve S-token chunks only: elsewhere the context would differ.
        """
        for field, wanted in (("window", window), ("stride", stride)):
            found = getattr(self.manifest, field)
            if wanted is not None and wanted != found:
                raise InputError(
                    f"{self.prefix}: scored with {field} {found}, but {field} {wanted} is asked "
                    f"for; change weighting.{field}, or score again with --{field} {wanted}"
                )
        own = self.manifest.sequence_length
        if own is None:
            return
        if sequence_length is not None and sequence_length != own:
            raise InputError(
                f"{self.prefix}: scored with --sequence-length {own}, but sequences of "
                f"{sequence_length} tokens are asked for; make data.sequence_length (of "
                f"tools/inspect_data.py: --sequence-length) {own}, or score again without "
                f"--sequence-length to serve any"
            )
        if packing is not None and packing != "chunk":
            raise InputError(
                f"{self.prefix}: scored with --sequence-length {own}, which fits packing chunk, "
                f"not {packing}; make data.packing (of tools/inspect_data.py: --packing) chunk, or "
                f"score again without --sequence-length"
            )

    def verify(self) -> None:
        """Read everything: InputError unless all lengths and the fingerprint are right."""
        self.check_index()
        if not np.array_equal(self.lengths, self.dataset.lengths):
            document = int((self.lengths != self.dataset.lengths).argmax())
            self._refuse_length(document)
        found = content_fingerprint(self)
        if found != self.manifest.fingerprint:
            raise InputError(
                f"{data_path(self.prefix)}: fingerprint {found}, but {manifest_path(self.prefix)} "
                f"says {self.manifest.fingerprint}: the values were changed; score again"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dataset, self.name)

    def _check_dataset(self) -> None:
        tokens = self.dataset
        if len(self) != len(tokens) or self.num_values != tokens.num_tokens:
            raise InputError(
                f"{self.prefix}: {len(self)} documents with {self.num_values} values, but "
                f"{tokens.prefix} has {len(tokens)} documents with {tokens.num_tokens} tokens; "
                f"score again"
            )
        step = max(len(self) // _SAMPLED_LENGTHS, 1)
        differs = self.lengths[::step] != tokens.lengths[::step]
        if differs.any():
            self._refuse_length(int(differs.argmax()) * step)
        pairs = (
            ("tokens_fingerprint", "fingerprint", tokens.fingerprint, "other token data"),
            (
                "tokenizer_digest",
                "tokenizer",
                tokens.manifest.tokenizer.digest,
                "another tokenizer",
            ),
        )
        for field, name, expected, what in pairs:
            found = getattr(self.manifest, field)
            if found != expected:
                raise InputError(
                    f"{manifest_path(self.prefix)}: {field} is {found}, but the {name} of "
                    f"{manifest_path(tokens.prefix)} is {expected}: it was made from {what}; score "
                    f"again"
                )
        found = sample_digest(self.prefix)
        if found != self.manifest.sample_digest:
            raise InputError(
                f"{data_path(self.prefix)}: sample_digest is {found}, but "
                f"{manifest_path(self.prefix)} says {self.manifest.sample_digest}: these files are "
                f"not of one run, or were changed; score again"
            )

    def _refuse_length(self, document: int) -> None:
        raise InputError(
            f"{self.prefix}: document {document} has {self.lengths[document]} values, but in "
            f"{self.dataset.prefix} it has {self.dataset.lengths[document]} tokens; score again"
        )


class SidecarWriter(Closing):
    """Writes the sidecar of a token dataset from the flat stream of its values.

    ``add`` may be given whole documents, parts of one or many at once: only the order counts, so
    the bytes do not depend on how the work was split. Files appear at ``close``, the manifest
    last; a context manager, leaving it with an exception leaves no file. Bounded memory.

    ``details``: the manifest's window, stride, sequence_length, score_first_window, min_context,
    mean_context and scorer.
    """

    def __init__(self, dataset: TokenDataset, name: str, **details: Any) -> None:
        self.dataset = dataset
        self.prefix = sidecar_prefix(dataset.prefix, name)
        self.details = details
        self.num_values = 0
        self._files = ExitStack()
        self._index = self._files.enter_context(atomic_file(index_path(self.prefix)))
        self._data = self._files.enter_context(atomic_file(data_path(self.prefix)))

    def add(self, values: np.ndarray) -> None:
        """Append float32 values of the next tokens, in stored order."""
        if values.dtype != FLOAT32 or values.ndim != 1:
            raise ValueError(
                f"{self.prefix}: float32 [n] expected, got {values.dtype} {values.shape}"
            )
        self._data.write(values.tobytes())
        self.num_values += len(values)

    def close(self) -> SidecarManifest:
        with self._files:
            if self.num_values != self.dataset.num_tokens:
                raise ValueError(
                    f"{self.prefix}: {self.num_values} values for {self.dataset.num_tokens} tokens "
                    f"of {self.dataset.prefix}"
                )
            blocks = self.dataset.length_blocks
            write_index(self._index, FLOAT32, len(self.dataset), blocks)
            for file in (self._index, self._data):  # a full disk shows here, before any rename
                file.flush()
                os.fsync(file.fileno())
            statistics = self._statistics()
            remove_manifest(self.prefix)
        manifest = SidecarManifest(
            sample_digest=sample_digest(self.prefix),
            values=self.num_values,
            tokens_fingerprint=self.dataset.fingerprint,
            tokenizer_digest=self.dataset.manifest.tokenizer.digest,
            **statistics,
            **self.details,
        )
        write_manifest(self.prefix, manifest)
        return manifest

    def give_up(self, error: BaseException) -> None:
        self._files.__exit__(type(error), error, error.__traceback__)

    def _statistics(self) -> dict[str, Any]:
        """fingerprint, scored, min, mean, max of the written file, in blocks of a fixed size so
        that the mean does not depend on how ``add`` was called."""
        digest = hashlib.blake2b(digest_size=16)
        scored, sums, smallest, largest, begin = 0, [], math.inf, -math.inf, 0
        for values in self._written_blocks():
            digest.update(values.tobytes())
            self._check(values, begin)
            begin += len(values)
            values = values[~np.isnan(values)]
            if len(values):
                scored += len(values)
                sums.append(float(values.sum(dtype=np.float64)))
                smallest = min(smallest, float(values.min()))
                largest = max(largest, float(values.max()))
        for lengths in self.dataset.length_blocks():
            digest.update(lengths.tobytes())
        return {
            "fingerprint": digest.hexdigest(),
            "scored": scored,
            "min": smallest if scored else None,
            "mean": math.fsum(sums) / scored if scored else None,
            "max": largest if scored else None,
        }

    def _written_blocks(self) -> Iterator[np.ndarray]:
        with open(self._data.name, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield np.frombuffer(block, FLOAT32)

    def _check(self, values: np.ndarray, begin: int) -> None:
        """ValueError unless values [begin, ...) are finite or NaN, and NaN at document starts."""
        pointers, itemsize = self.dataset.pointers, self.dataset.dtype.itemsize
        if np.isinf(values).any():
            at = begin + int(np.isinf(values).argmax())
            document = int(np.searchsorted(pointers, at * itemsize, side="right")) - 1
            raise ValueError(f"{self.prefix}: an infinite value in document {document}")
        # Not np.searchsorted, which would copy all of them at each call: a file has them unaligned.
        bounds = begin * itemsize, (begin + len(values)) * itemsize
        first, end = (bisect.bisect_left(pointers, bound) for bound in bounds)
        starts = pointers[first:end] // itemsize - begin
        starts = starts[self.dataset.lengths[first:end] > 0]
        if not np.isnan(values[starts]).all():
            raise ValueError(f"{self.prefix}: a value at index 0 of a document, which is no target")
