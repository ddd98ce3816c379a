"""Measure speed and memory: ratios of two ways of doing one thing, side by side in one run."""

import argparse
from pathlib import Path

from lctw_megatron.cli import positive, run_command


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="--debug shows tracebacks, --version the version."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="cpu|gpu|scoring|fp8")
    cpu = commands.add_parser("cpu", help="loss, steps, attention and sparse backward on this CPU")
    cpu.add_argument("--output", default="benchmark.json", help="all numbers go there")
    cpu.add_argument("--full-head", action="store_true", help="the loss at 8,192 x 128,256 (slow)")
    gpu = commands.add_parser("gpu", help="timings on GPUs, most on one: a 1B model at 32k tokens")
    gpu.add_argument("--output", default="benchmark_gpu.json", help="all numbers go there")
    gpu.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="parts: steps packed deterministic overlap profile head documents kernels scoring "
        "scorers checkpoints scaling full_size full_size_scoring full_size_state fp8; default: all",
    )
    scoring = commands.add_parser("scoring", help="our scorer beside transformers on this CPU")
    scoring.add_argument(
        "--output", type=Path, default="benchmark_scoring.json", help="all numbers go there"
    )
    scoring.add_argument("--hf", type=Path, required=True, help="a Hugging Face folder")
    scoring.add_argument("--text", nargs="+", required=True, help="files with a long document")
    fp8 = commands.add_parser("fp8", help="how far FP8 linear layers move scores and weights")
    fp8.add_argument(
        "--output", type=Path, default="benchmark_fp8.json", help="all numbers go there"
    )
    fp8.add_argument("--checkpoint", type=Path, required=True, help="a run folder or checkpoint")
    fp8.add_argument("--data", metavar="PREFIX", required=True, help="token dataset of long texts")
    fp8.add_argument("--sequence-length", type=positive, default=8192, help="default: %(default)s")
    fp8.add_argument("--window", type=positive, default=2048, help="default: %(default)s")
    fp8.add_argument("--sequences", type=positive, default=32, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.command == "gpu":
        from lctw_megatron.benchmarks.gpu import gpu_benchmark

        return gpu_benchmark(Path(options.output), options.only)
    if options.command == "scoring":
        from lctw_megatron.benchmarks.scoring_cpu import scoring_benchmark

        return scoring_benchmark(options.hf, options.text, options.output)
    if options.command == "fp8":
        from lctw_megatron.benchmarks.fp8 import fp8_benchmark

        return fp8_benchmark(
            options.checkpoint, options.data, options.output, options.sequence_length,
            options.window, options.sequences,
        )  # fmt: skip
    from lctw_megatron.benchmarks.cpu import cpu_benchmark

    return cpu_benchmark(Path(options.output), options.full_head)


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
