"""All GPUs of a host beside one of them: tokens a second under each layout."""

import subprocess
import sys
import tempfile
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
    alone = measured(1, run_of({}, gpus))["tokens_per_second"]
    for name, layout in layouts(gpus).items():
        for kind, sequences in (("strong", gpus), ("weak", gpus**2)):
            run = run_of(layout, sequences)
            try:
                check_layout(run, gpus)
            except InputError as error:
                results[f"{name}, {kind}"] = str(error)
                continue
            row = measured(gpus, run)
            results[f"{name}, {kind}"] = {"speedup": row["tokens_per_second"] / alone} | row
    long = run_of({"context": gpus}, 1, 131072)
    results[f"CP{gpus} at 131,072 tokens"] = measured(gpus, long)


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


def measured(ranks: int, run: RunConfig) -> dict[str, Any]:
    """What ``main`` finds on so many GPUs, and the share of their data sheets that it is. Raises
    CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder) / "run.yaml", Path(folder) / "found.json"
        asked.write_text(dump_yaml(run))
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = [*start, "-m", __name__, str(asked), str(found)]
        subprocess.run([sys.executable, *program], check=True)
        row = read_json_object(found)
    row["utilisation"] = row["tflops_per_second"] / ranks / data_sheet_tflops()
    return row


def main(asked: str, found: str) -> None:
    """One rank: time the step of the run in ``asked``; the first writes ``found``, with the most
    memory that a rank had in use."""
    run = load_run(Path(asked))
    row = step_benchmark(run, {"uniform": WEIGHTINGS["uniform"]}, repeats=3)["uniform"]
    held = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
    row["rank_gib"] = held.item() / 2**30
    if torch.distributed.get_rank() == 0:
        write_json(found, row)


if __name__ == "__main__":
    main(*sys.argv[1:])
