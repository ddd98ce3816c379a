"""The weights a run trains with, seen on a few sequences of its last step.

evaluation.json's `weights`:

weighting   the run's section; `sequences` and `targets` say how many were looked at
histogram   `starts`: first values of log buckets, the first being 0 alone; `targets` and `weight`:
            number and Σw in each
classes     `bins`, `targets`, `weight`: the same for near, far and first-seen targets
statistics  as in metrics.jsonl
page        the last targets of one sequence: `text`, `weight`, `long_loss` and `short_loss` (null:
            not scored) of each; `data`, `document` and `first_target` say where it is from

The final model gives the long losses; the short losses come from where the run takes them. The last
step's sequences, because they are the last that were weighted; the model has trained on them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.batch import IGNORE, Sample
from lctw_megatron.data.loader import TokenLoader, TracedSample
from lctw_megatron.data.token_text import TokenTexts
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.model_losses import ModelLosses, tokenizer_of
from lctw_megatron.evaluation.probes import class_of, distance_of
from lctw_megatron.evaluation.sequence_weights import (
    sequence_weights,
    weight_by_class,
    weight_histogram,
)
from lctw_megatron.model.checkpoint import CheckpointManifest
from lctw_megatron.platform.world import first_rank_decides
from lctw_megatron.weighting.parse import Weighting, parse_weighting
from lctw_megatron.weighting.schemes import Uniform
from lctw_megatron.weighting.statistics import weight_statistics

PAGE_TARGETS = 700


def sample_or_reason(
    checkpoint: Path,
    manifest: CheckpointManifest,
    near: int,
    most: int,
    load: Callable[[], ModelLosses],
) -> dict[str, Any] | str | None:
    """The sample, None for uniform weights, or one line that says why there is none: an imported
    checkpoint, or training data that is no longer there. A collective call.

    load: gives the model of ``checkpoint``, and is called only if there is a sample.
    """
    run = manifest.run
    if run is None:
        return "the checkpoint is not from a training run"
    if run.weighting.scheme == "custom":  # a checkpoint from elsewhere would name what is imported
        return f"the run's weights are of a function of its own, {run.weighting.function}"
    weighting = parse_weighting(run.weighting)
    if isinstance(weighting.scheme, Uniform):
        return None
    first_ranks: list[TokenTexts] = []

    def read() -> tuple[list[Sample], list[TracedSample]] | str:
        try:
            first_ranks.append(TokenTexts(tokenizer_of(checkpoint, manifest)))
            return _last_step(manifest, run, weighting, most)
        except InputError as error:
            return str(error)

    def texts(ids: np.ndarray) -> list[str]:
        return first_rank_decides(lambda: first_ranks[0](ids))

    found = first_rank_decides(read)
    if isinstance(found, str):
        return found
    return weight_sample(load(), weighting, *found, near, texts)


def weight_sample(
    model: ModelLosses,
    weighting: Weighting,
    samples: list[Sample],
    traced: list[TracedSample],
    near: int,
    texts: Callable[[np.ndarray], list[str]],
) -> dict[str, Any]:
    """The sample of the module's docstring. ``samples`` carry short losses in frozen mode."""
    length, config = len(samples[0].tokens), weighting.config
    streams = []
    at_once = model.sequences_at_once(length)
    for begin in range(0, len(samples), at_once):
        part = samples[begin : begin + at_once]
        long_loss = model.losses(part)
        short_loss = np.stack([_short(sample) for sample in part])
        if config.mode == "self" and weighting.scheme.needs_short_loss:
            assert config.window and config.stride
            tokenizer = model.manifest.tokenizer or {}
            bos_id = tokenizer.get("bos_id") if tokenizer.get("add_bos") else None
            short_loss = model.short_losses(part, config.window, config.stride, bos_id)
        streams.append(
            (long_loss, short_loss, *sequence_weights(weighting, part, long_loss, short_loss))
        )
    long_loss, short_loss, weights, live = (np.concatenate(x) for x in zip(*streams, strict=True))
    distance = np.stack([distance_of(sample) for sample in samples])
    statistics = weight_statistics(
        torch.from_numpy(weights), torch.from_numpy(long_loss), torch.from_numpy(live)
    )
    fullest = int(live.sum(1).argmax())
    page = [stream[fullest] for stream in (weights, long_loss, short_loss)]
    return {
        "weighting": config.model_dump(mode="json", exclude_none=True),
        "sequences": len(samples),
        "targets": int(live.sum()),
        "histogram": weight_histogram(weights[live]),
        "classes": weight_by_class(weights[live], class_of(distance[live], near)),
        "statistics": statistics.summary(),
        "page": _page(samples[fullest], traced[fullest], texts, *page),
    }


def _last_step(
    manifest: CheckpointManifest, run: RunConfig, weighting: Weighting, most: int
) -> tuple[list[Sample], list[TracedSample]]:
    frozen = weighting.scheme.needs_short_loss and run.weighting.mode == "frozen"
    loader = TokenLoader(
        run.data,
        seed=run.seed,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=1,
        scores=frozen,
        window=run.weighting.window,
        stride=run.weighting.stride,
        vocab_size=manifest.model.vocab_size,
    )
    try:
        if manifest.loader is not None:
            loader.load_state_dict(manifest.loader)
        traced = loader.documents(max(manifest.step - 1, 0))[:most]
        sources = {source.prefix: source for source in loader.sources}
        return [sources[item.prefix].read(item.sequence) for item in traced], traced
    finally:
        loader.close()


def _short(sample: Sample) -> np.ndarray:
    """Its short losses, all NaN where it has none."""
    if sample.short_loss is not None:
        return sample.short_loss
    return np.full(len(sample.tokens), np.nan, dtype=np.float32)


def _page(
    sample: Sample,
    traced: TracedSample,
    texts: Callable[[np.ndarray], list[str]],
    weights: np.ndarray,
    long_loss: np.ndarray,
    short_loss: np.ndarray,
) -> dict[str, Any]:
    """The last targets of the last piece of a sequence, where the context is longest."""
    live = np.flatnonzero(sample.labels != IGNORE)
    piece = traced.pieces[-1]
    chosen = live[max(len(live) - min(PAGE_TARGETS, piece.length), 0) :]
    begin = piece.offset + piece.length + 1 - len(chosen)
    return {
        "data": traced.prefix,
        "document": piece.document,
        "first_target": begin,
        "text": texts(sample.labels[chosen]),
        "weight": rounded(weights[chosen]),
        "long_loss": rounded(long_loss[chosen]),
        "short_loss": rounded(short_loss[chosen]),
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """Four decimals, null for NaN: for JSON that people may read."""
    return [None if np.isnan(value) else round(float(value), 4) for value in values]
