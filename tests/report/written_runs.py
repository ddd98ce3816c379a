"""Run folders as training and evaluation leave them, with made-up numbers."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.evaluation.probes import Probes
from lctw_megatron.evaluation.recall_result import FORMAT as RECALL
from lctw_megatron.evaluation.recall_result import digest_of, with_means
from lctw_megatron.evaluation.result_file import FORMAT
from lctw_megatron.evaluation.sequence_weights import weight_by_class, weight_histogram
from lctw_megatron.report.groups import Group, group_runs
from lctw_megatron.report.runs import read_runs

SEQUENCES, LENGTH, NEAR = 6, 64, 16


def groups_of(*folders: str | Path) -> list[Group]:
    return group_runs(*read_runs(folders))


def write_run(folder: Path, better: float = 0.0, weighted: bool = False, **settings: Any) -> Path:
    """``better``: nats by which far targets are predicted better than in another run."""
    folder.mkdir(parents=True)
    write_metrics(folder / "metrics.jsonl", better, weighted)
    evaluation = make_evaluation(better, weighted)
    evaluation["settings"].update(settings)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def write_metrics(path: Path, better: float, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    with open(path, "w") as file:
        for step in range(60):
            loss = 3 + 3 * np.exp(-step / 5) + rng.normal(0, 0.05)
            line = {
                "step": step,
                "loss/plain": loss,
                "loss/weighted": loss + 0.2 * weighted,
                "loss/near": loss - 1,
                "loss/far": loss - better,
                "weights/n_eff_share": 0.4 if weighted else 1.0,
                "weights/max": 20.0 if weighted else 1.0,
                "speed/tokens_per_second": 7000.0 + step,
            }
            if step % 20 == 19:
                line["validation/loss/plain"] = loss + 0.1
            file.write(json.dumps(line) + "\n")


def make_evaluation(better: float, weighted: bool) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    probes = Probes(SEQUENCES, LENGTH, NEAR)
    context = np.arange(1, LENGTH + 1)
    for sequence in range(SEQUENCES):
        distance = rng.integers(1, LENGTH, LENGTH)
        distance = np.where(distance > context, -1, distance)
        loss = rng.gamma(2, 1, LENGTH) - better * (distance > NEAR)
        probes.add(sequence, loss, loss + 0.5, context, distance)
    weights = rng.gamma(1, 1, 500) * (rng.random(500) < 0.7)
    return {
        "format": FORMAT,
        "settings": {
            "tokens_fingerprint": "f",
            "sequence_length": LENGTH,
            "near": NEAR,
            "window": NEAR,
            "data": "data/held_out",
        },
        "sequences": [[number, 0] for number in range(SEQUENCES)],
        "loss": 2.0,
        "targets": SEQUENCES * LENGTH,
        **probes.summary(with_gain=True),
        "longppl": {"longppl": 8.0, "perplexity": 7.5, "key_tokens": 9, "evaluator": "runs/base"},
        "weights": {
            "weighting": {"scheme": "sparse"},
            "sequences": 2,
            "targets": 500,
            "histogram": weight_histogram(weights),
            "classes": weight_by_class(weights, rng.integers(0, 3, 500)),
            "statistics": {},
            "page": {
                "data": "data/train",
                "document": 3,
                "first_target": 64,
                "text": ["<script>", " cost", " $5", " & $6", "\n", "\x1b[31m", "世", "end"],
                "weight": [0.0, 2.5, 0.0, 1.0, 0.5, 0.0, 3.0, 0.25],
                "long_loss": [1.0] * 8,
                "short_loss": [None, *[2.0] * 7],
            },
        }
        if weighted
        else None,
    }


TASKS, LENGTHS, DEPTHS, SAMPLES = ("one_key", "json", "frequent_words"), (1024, 4096), (0.0, 1.0), 4
MOST = 20


def write_recall(
    folder: Path,
    better: float = 0.0,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    tasks: Sequence[str] = TASKS,
    samples: int = SAMPLES,
    **settings: Any,
) -> Path:
    """recall.json; ``better``: nats by which every answer token is likelier than in another run
    with the same ``seed``, whose samples are the same, at every depth that both have, as many as
    both have."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = []
    for task in tasks:
        for length in LENGTHS:
            for depth in [None] if task == "frequent_words" else depths:
                where = f"{task} {length} {depth}"
                rng = np.random.default_rng([seed, zlib.crc32(where.encode())])
                tokens = rng.integers(2, 9, MOST)[:samples]
                nats = rng.gamma(2, 1, MOST)[:samples] * tokens
                digests = [f"{number:016x}" for number in rng.integers(2**62, size=MOST)[:samples]]
                long = length > LENGTHS[0]
                cells.append(
                    with_means(
                        {
                            "task": task,
                            "length": length,
                            "depth": depth,
                            "samples_digest": digest_of(digests),
                            "digests": digests,
                            "nats": (nats - better * tokens).tolist(),
                            "tokens": tokens.tolist(),
                            "right": rng.integers(0, 2, MOST)[:samples].astype(float).tolist(),
                            "short_nats": (nats + tokens).tolist() if long else None,
                            "short_right": [0.0] * samples if long else None,
                        }
                    )
                )
    settings = {
        "tasks": tasks, "lengths": LENGTHS, "depths": depths, "samples": samples, "window": 1024,
        "haystack": "sentences", **settings,
    }  # fmt: skip
    result = {"format": RECALL, "settings": settings, "seconds": {}, "cells": cells}
    (folder / "recall.json").write_text(json.dumps(result))
    return folder
