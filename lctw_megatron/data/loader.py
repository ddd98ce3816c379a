"""Training batches, cut for the rank that asks.

The order of training samples is fixed by the data and the seed (see ``blend``). Step n trains on G
consecutive samples of it, the global batch. They are dealt out in this order::

    microbatch 0: rank 0's sequences, rank 1's, ...; microbatch 1: rank 0's, ...

so any number of data-parallel ranks sees the same global batch, and a run goes on with another
number of ranks as if nothing had happened.

Legend of shapes: see ``batch``.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lctw_megatron.config.schema import DataConfig
from lctw_megatron.data.blend import SampleOrder
from lctw_megatron.data.microbatch import BatchSlice, check_cut, make_microbatch
from lctw_megatron.data.sequence_source import open_sources, unlike_scores_line
from lctw_megatron.data.sequences import Piece
from lctw_megatron.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_LOOKAHEAD = 2
"""Microbatches read ahead, by one thread. A warm file needs none (0.2 ms for 4,096 tokens, 2 ms for
131,072); a cold network file system may take longer than a step, and this hides it."""

_NOT_THE_ORDER = {"global_batch_size", "short losses"}
"""What of ``state_dict``'s data may change and leaves every sample where it was."""


class TracedSample(NamedTuple):
    """Where a sequence of a training step came from."""

    sample: int
    prefix: str
    epoch: int
    sequence: int
    pieces: list[Piece]


class TokenLoader:
    """Microbatches of any training step, as dicts of CPU tensors.

    ``scores`` adds short_loss from the sidecars called ``data.scores``, which must have been made
    with ``window`` and ``stride`` (None: any). ``vocab_size`` None takes the tokenizer's.

    Every batch holds, b = micro_batch_size and S cut by cp_size, zigzag: tokens, labels,
    position_ids int64 [b, S]; loss_mask float32 [b, S]; with ``scores`` short_loss float32 [b, S];
    and uncut: sequence_tokens, sequence_labels int64 [b, S]; with data.packing=pack also boundaries
    int32 [b, P+1].
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        scores: bool = False,
        window: int | None = None,
        stride: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._global_batch_size = global_batch_size
        self._slice = BatchSlice(micro_batch_size, dp_rank, dp_size, cp_rank, cp_size)
        self.cut(micro_batch_size)
        if not data.train:
            raise InputError("data.train is empty; name the prefix of at least one token dataset")
        check_cut(data, cp_size)
        self._data = data
        self._seed = seed
        self.sources = open_sources(
            data.train,
            data,
            scores=data.scores if scores else None,
            window=window,
            stride=stride,
            vocab_size=vocab_size,
        )
        self._order = SampleOrder(
            [len(source) for source in self.sources],
            [corpus.weight for corpus in data.train],
            seed,
            data.shuffle,
        )
        # [first step, its first sample, global batch size] since the last change of batch size
        self._batch_sizes = [[0, 0, global_batch_size]]
        self._data_since = 0
        """The first sample that was drawn from the data as they are now."""
        self.consumed_samples = 0
        """Samples of all steps up to the last one asked for."""
        self._reader = ThreadPoolExecutor(1, "lctw-loader")
        self._ahead: dict[tuple[int, int], Future[dict[str, Tensor]]] = {}

    def cut(self, micro_batch_size: int) -> None:
        """Take microbatches of another size, before any step. InputError if they do not fit."""
        self._slice = replace(self._slice, micro_batch_size=micro_batch_size)
        if self._global_batch_size % self._slice.sequences_at_once:
            raise InputError(
                f"training.global_batch_size={self._global_batch_size} is no multiple of "
                f"training.micro_batch_size={micro_batch_size} times {self._slice.dp_size} "
                "data-parallel ranks; change one of the three"
            )

    @property
    def micro_batch_size(self) -> int:
        return self._slice.micro_batch_size

    @property
    def microbatches(self) -> int:
        """Microbatches of one step on every rank."""
        return self._global_batch_size // self._slice.sequences_at_once

    def packing_cost_lines(self) -> list[str]:
        """For the log: what the way of packing costs, one line a corpus."""
        data = self._data
        return [
            f"{source.prefix}: "
            + source.packing_cost.line(data.packing, data.tails, data.sequence_length)
            for source in self.sources
        ]

    def scores_lines(self) -> list[str]:
        """For the log: how many targets have a short loss, one line a corpus with scores, and one
        if these were not made alike."""
        lines = [source.scores_line() for source in self.sources]
        return [line for line in [*lines, unlike_scores_line(self.sources)] if line]

    def step(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's microbatches of training step ``step``, counted from 0.

        From here on the step's samples count as consumed. Any step may be asked for, again too.
        """
        first, size = self._span(step)
        self.consumed_samples = first + size
        return self._microbatches(step)

    def documents(self, step: int) -> list[TracedSample]:
        """Where the sequences of the whole global batch of a step come from. InputError for one
        that was trained on other data, before they changed."""
        first, size = self._span(step)
        if first < self._data_since:
            raise InputError(
                f"step {step} was trained on other data, before the run went on with "
                f"{self.sources[0].prefix} under --allow-changes: what it read is not known any "
                "more; ask for a later step"
            )
        traced = []
        for sample in range(first, first + size):
            corpus, epoch, sequence = self._order[sample]
            source = self.sources[corpus]
            pieces = source.index.pieces(sequence)
            traced.append(TracedSample(sample, source.prefix, epoch, sequence, pieces))
        return traced

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: how far the run has come, and on which data. Plain JSON."""
        data = self._data
        return {
            "consumed_samples": self.consumed_samples,
            "batch_sizes": [list(span) for span in self._batch_sizes],
            "data_since": self._data_since,
            "data": {
                "seed": self._seed,
                "global_batch_size": self._global_batch_size,
                "sequence_length": data.sequence_length,
                "packing": data.packing,
                "tails": data.tails,
                "shuffle": data.shuffle,
                "weights": [corpus.weight for corpus in data.train],
                "tokens": [source.dataset.fingerprint for source in self.sources],
                "tokenizer": self.sources[0].tokenizer.digest,
                "short losses": [
                    source.sidecar and source.sidecar.manifest.fingerprint
                    for source in self.sources
                ],
            },
        }

    def load_state_dict(self, state: dict[str, Any], allow_changes: bool = False) -> None:
        """Go on where ``state`` stopped.

        Raises InputError, both sides named, if the data or what decides its order has changed,
        unless ``allow_changes``: then sample numbers go on counting in the new order.
        """
        changed = self.changed_since(state)
        if changed and not allow_changes:
            prefixes = ", ".join(source.prefix for source in self.sources)
            raise InputError(
                f"the checkpoint was trained on other data than {prefixes} now give: "
                f"{'; '.join(changed.values())}; restore them, start a new run, or pass "
                "--allow-changes to tools/train.py"
            )
        self.consumed_samples = state["consumed_samples"]
        reordered = changed.keys() - _NOT_THE_ORDER
        # Checkpoints of before do not say it.
        self._data_since = self.consumed_samples if reordered else state.get("data_since", 0)
        self._batch_sizes = [list(span) for span in state["batch_sizes"]]
        step, sample, size = self._batch_sizes[-1]
        if size != self._global_batch_size:
            step += (self.consumed_samples - sample) // size
            self._batch_sizes.append([step, self.consumed_samples, self._global_batch_size])
        self._forget_ahead()

    def changed_since(self, state: dict[str, Any]) -> dict[str, str]:
        """What of the data, or of what decides its order, was another when ``state`` was saved: its
        name -> in words."""
        ours, theirs = self.state_dict()["data"], state["data"]
        return {
            name: f"{name} was {theirs.get(name)}, is {ours.get(name)}"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        }

    def close(self) -> None:
        """End the thread that reads ahead. Also happens when the loader is forgotten."""
        self._forget_ahead()
        self._reader.shutdown()

    def _span(self, step: int) -> tuple[int, int]:
        """(first sample, samples) of a step."""
        if step < 0:
            raise InputError(f"there is no step {step}; steps are counted from 0")
        start, sample, size = next(s for s in reversed(self._batch_sizes) if s[0] <= step)
        return sample + (step - start) * size, size

    def _microbatches(self, step: int) -> Iterator[dict[str, Tensor]]:
        for microbatch in range(self.microbatches):
            yield self._get(step, microbatch)

    def _get(self, step: int, microbatch: int) -> dict[str, Tensor]:
        ready = self._ahead.pop((step, microbatch), None)
        result = ready.result() if ready else self._build(step, microbatch)
        flat = step * self.microbatches + microbatch
        wanted = [divmod(flat + 1 + i, self.microbatches) for i in range(_LOOKAHEAD)]
        for stale in [key for key in self._ahead if key not in wanted]:
            self._ahead.pop(stale).cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._build, *key)
        return result

    def _build(self, step: int, microbatch: int) -> dict[str, Tensor]:
        first, _ = self._span(step)
        places = [self._order[first + row] for row in self._slice.rows(microbatch)]
        samples = [self.sources[corpus].read(sequence) for corpus, _, sequence in places]
        return make_microbatch(samples, self._data, self._slice)

    def _forget_ahead(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
