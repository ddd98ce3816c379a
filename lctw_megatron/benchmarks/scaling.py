"""All GPUs of a host beside one of them: tokens a second under each layout."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lctw_megatron.atomic import write_json
from lctw_megatron.benchmarks.chip import data_sheet_tflops
from lctw_megatron.benchmarks.large_model import LARGE, WEIGHTINGS
from lctw_megatron.benchmarks.steps import step_benchmark
from lctw_megatron.config.layout_rules import check_layout
from lctw_megatron.config.load import dump_yaml, load_run
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.errors import InputError
from lctw_megatron.platform.world import started_ranks


def time_scaling(results: dict[str, Any]) -> None:
    """A uniform step of as many sequences as there are GPUs: on one, on all (strong scaling), and
    on all with that many times the sequences (weak); and 131,072 tokens over all by context.

    `speedup` is tokens a second over the one GPU's. Each layout is a program of its own.
    """
    gpus = torch.cuda.device_count()
    if gpus < 2 or started_ranks() > 1:
        results["scaling"] = (
            f"needs several GPUs and no torchrun; {gpus} GPUs, {started_ranks()} ranks"
        )
        return
    alone = measured(1, run_of({}, gpus))["uniform"]["tokens_per_second"]
    for name, layout in layouts(gpus).items():
        for kind, sequences in (("strong", gpus), ("weak", gpus**2)):
            run = run_of(layout, sequences)
            try:
                check_layout(run, gpus)
            except InputError as error:
                results[f"{name}, {kind}"] = str(error)
                continue
            row = measured(gpus, run)["uniform"]
            results[f"{name}, {kind}"] = {"speedup": row["tokens_per_second"] / alone} | row
    long = run_of({"context": gpus}, 1, 131072)
    results[f"CP{gpus} at 131,072 tokens"] = measured(gpus, long)["uniform"]


def layouts(gpus: int) -> dict[str, dict[str, Any]]:
    """The ways to share one model's step over ``gpus``."""
    return {
        f"DP{gpus}": {},
        f"CP{gpus}": {"context": gpus},
        f"TP{gpus} with sequence parallelism": {"tensor": gpus, "sequence": True},
    }


def run_of(
    layout: dict[str, Any],
    sequences: int,
    length: int = 32768,
    model: dict[str, Any] = LARGE["model"],
) -> RunConfig:
    return RunConfig.model_validate(
        LARGE
        | {
            "data": LARGE["data"] | {"sequence_length": length},
            "model": model,
            "layout": LARGE["layout"] | layout,
            "training": LARGE["training"] | {"global_batch_size": sequences},
        }
    )


def measured(
    ranks: int, run: RunConfig, weightings: Sequence[str] = ("uniform",)
) -> dict[str, dict[str, Any]]:
    """What ``main`` finds on so many GPUs of steps under these of WEIGHTINGS, and the share of the
    GPUs' data sheets that each is. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder) / "run.yaml", Path(folder) / "found.json"
        asked.write_text(dump_yaml(run))
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = [*start, "-m", __name__, str(asked), str(found), *weightings]
        subprocess.run([sys.executable, *program], check=True)
        rows = read_json_object(found)
    for row in rows.values():
        row["utilisation"] = row["tflops_per_second"] / ranks / data_sheet_tflops()
    return rows


def main(asked: str, found: str, *weightings: str) -> None:
    """One rank: time the steps of the run in ``asked`` under ``weightings``; the first writes
    ``found``. If there is one, its `rank_gib` is the most memory that a rank had in use, its
    `profile` what the first rank's GPU did, and `ranks` beside it what all did."""
    run = load_run(Path(asked))
    alone = len(weightings) == 1
    rows = step_benchmark(
        run, {name: WEIGHTINGS[name] for name in weightings}, repeats=3, profiled=alone
    )
    held = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    if alone:
        row = rows[weightings[0]]
        row["rank_gib"] = held.item() / 2**30
        row["ranks"] = of_all_ranks(row["profile"])
    if torch.distributed.get_rank() == 0:
        write_json(found, rows)


def of_all_ranks(profile: dict[str, Any]) -> dict[str, list[float]]:
    """What each rank's profile says of waiting and computing. The slowest rank waits least: where
    another waits longer, that is what it waits for."""
    profiles: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(profiles, profile)
    found = {"communication alone": [each["communication alone"] for each in profiles]}
    for kind in ("attention", "matrix products"):
        found[f"{kind} ms"] = [each["kinds"][kind]["milliseconds"] for each in profiles]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
