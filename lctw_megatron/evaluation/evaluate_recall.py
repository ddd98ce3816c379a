"""Measure the recall of a checkpoint and write recall.json."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.atomic import atomic_file, check_not_read, write_json
from lctw_megatron.config.layout_rules import check_sequence
from lctw_megatron.config.rope import longest_context
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.data.earlier_output import check_earlier_lines
from lctw_megatron.data.manifest import files_of
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.recall import Cell, measure
from lctw_megatron.evaluation.recall_result import FORMAT, digest_of, read_recall, with_means
from lctw_megatron.evaluation.recall_samples import (
    WINDOW,
    RecallSample,
    SampleMaker,
    depths_of,
    samples_of,
)
from lctw_megatron.evaluation.saved_result import still_holds, weights_identity
from lctw_megatron.model.checkpoint import CheckpointManifest, agreed_checkpoint
from lctw_megatron.ownership import sole_writer
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.world import first_rank_decides, join, on_first_rank
from lctw_megatron.progress import Progress


@dataclass(frozen=True)
class RecallSettings:
    """What to measure."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: int = 5
    """Depths, evenly spaced from 0 to 1."""
    samples: int = 20
    """Of each task, length and depth."""
    seed: int = 0
    haystack: str | None = None
    """See ``haystack.open_haystack``."""
    window: int | None = None
    """Tokens of the short context; None: what the run's weighting had, else WINDOW."""

    def __post_init__(self) -> None:
        # What is named twice is measured once: a result has one cell of each task and length.
        for name in ("tasks", "lengths"):
            object.__setattr__(self, name, list(dict.fromkeys(getattr(self, name))))


def recall_to_file(
    checkpoint: str | Path,
    output: str | Path,
    settings: RecallSettings,
    layout: LayoutConfig,
    tokens_per_forward: int | None,
    samples_file: str | Path | None = None,
) -> dict[str, Any] | None:
    """Measure, unless ``output`` holds the result already; write it there, and the samples as JSON
    lines to ``samples_file``. The result, on the first rank. All ranks call it. InputError for
    whatever does not fit."""
    from lctw_megatron.evaluation.model_losses import ModelLosses, tokenizer_of

    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}: a seed is not negative; give 0 or more")
    if samples_file is not None:
        read = [output]
        if settings.haystack is not None:
            read += [settings.haystack, *files_of(settings.haystack)]
        check_not_read("--write-samples", samples_file, read)
        keys = ("task", "length", "text", "answers")
        check_earlier_lines("--write-samples", samples_file, "list of samples", keys)
    first = join(layout)
    place, manifest = agreed_checkpoint(checkpoint)
    tokenizer = first_rank_decides(lambda: tokenizer_of(place, manifest))
    maker = SampleMaker(tokenizer, settings.haystack, settings.seed, manifest.model.vocab_size or 0)
    digest = tokenizer.identity.digest
    described = first_rank_decides(lambda: describe(settings, place, manifest, maker, digest))
    first_rank_decides(lambda: _check(settings, described["window"], layout, maker))
    with ExitStack() as held:

        def survey() -> dict[str, Any] | None:
            """The result if it is there; else its file is ours to write."""
            for line in _notes(settings, manifest, maker):
                print(line, flush=True)
            if samples_file is not None:
                _write_samples(samples_file, maker, settings, described["depths"])
            found = read_recall(output)
            if still_holds(output, found and found["settings"], described):
                return found
            held.enter_context(sole_writer(Path(output), print))
            return None

        if found := first_rank_decides(survey):
            return found if first else None
        model = ModelLosses(place, layout, max(settings.lengths), tokens_per_forward)
        if first:
            print(capabilities().line(), flush=True)
        result: dict[str, Any] = {
            "format": FORMAT,
            "settings": described,
            "seconds": {},
            "cells": [],
        }
        for length in settings.lengths:
            begin = time.perf_counter()
            result["cells"] += list(_cells(model, maker, settings, described, length))
            result["seconds"][str(length)] = round(time.perf_counter() - begin, 3)
        model.free()
        on_first_rank(lambda: write_json(output, result))
    return result if first else None


def describe(
    settings: RecallSettings,
    checkpoint: Path,
    manifest: CheckpointManifest,
    maker: SampleMaker,
    tokenizer_digest: str,
) -> dict[str, Any]:
    """Everything the result depends on."""
    own = manifest.run.weighting.window if manifest.run else None
    return {
        **asdict(settings),
        "depths": np.linspace(0, 1, settings.depths).round(6).tolist()
        if settings.depths > 1
        else [0.5],
        "window": settings.window or own or WINDOW,
        "haystack": maker.haystack.name,
        "haystack_identity": maker.haystack.identity,
        "checkpoint": str(checkpoint),
        "weights": weights_identity(checkpoint),
        "tokenizer": tokenizer_digest,
    }


def _cells(
    model: Any,
    maker: SampleMaker,
    settings: RecallSettings,
    described: dict[str, Any],
    length: int,
) -> Iterator[dict[str, Any]]:
    """The cells of one length."""
    depths = described["depths"]
    window = described["window"] if described["window"] < length else None
    samples = samples_of(maker, settings.tasks, length, depths, settings.samples)
    cells: dict[tuple[str, float | None], tuple[Cell, list[str]]] = {
        (task, depth): (Cell(), []) for task in settings.tasks for depth in depths_of(task, depths)
    }
    stream = model.world.progress_stream
    total = len(cells) * settings.samples
    with Progress(f"recall at {length:,}", total, "samples", stream=stream) as progress:
        for measured in measure(model, samples, length, window, maker.bos_id):
            sample = measured.sample
            cell, digests = cells[sample.task, sample.depth]
            cell.add(measured)
            digests.append(sample.digest.hex())
            if not np.isfinite(cell.nats[-1]):
                raise InputError(
                    f"{model.checkpoint}: its loss of an answer of task {sample.task} at "
                    f"{length} tokens is not finite; evaluate an earlier checkpoint"
                )
            progress.update(1, tokens=length)
    for (task, depth), (cell, digests) in cells.items():
        values = {name: value or None for name, value in asdict(cell).items()}
        yield with_means(
            {
                "task": task,
                "length": length,
                "depth": depth,
                "samples_digest": digest_of(digests),
                "digests": digests,
                **values,
            }
        )


def _check(settings: RecallSettings, window: int, layout: LayoutConfig, maker: SampleMaker) -> None:
    """Check every sample and divide every length, before anything takes long."""
    for length in settings.lengths:
        check_sequence(length, f"{length} of --lengths", layout)
        if window < length:
            check_sequence(window, f"--window {window}", layout)
        for task in settings.tasks:
            maker.check(task, length, settings.samples, window if window < length else None)


def _notes(
    settings: RecallSettings, manifest: CheckpointManifest, maker: SampleMaker
) -> Iterator[str]:
    positions = longest_context(manifest.model)
    beyond = [length for length in settings.lengths if positions and length > positions]
    if beyond:
        yield (
            f"lengths {', '.join(map(str, beyond))} are beyond the model's max_position_embeddings "
            f"{positions}: measured all the same"
        )
    if maker.bos_id is None:
        yield "the tokenizer puts no BOS before a text: samples and short contexts have none either"


def _write_samples(
    path: str | Path, maker: SampleMaker, settings: RecallSettings, depths: Sequence[float]
) -> None:
    """JSON lines, as a person reads them."""
    with atomic_file(path, "w") as file:
        for length in settings.lengths:
            for sample in samples_of(maker, settings.tasks, length, depths, settings.samples):
                file.write(json.dumps(_readable(maker, sample), ensure_ascii=False) + "\n")


def _readable(maker: SampleMaker, sample: RecallSample) -> dict[str, Any]:
    return {
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "number": sample.number,
        "text": maker.text(sample),
        "answers": sample.answer_texts,
    }
