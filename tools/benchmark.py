"""Measure speed and memory: ratios of two ways of doing one thing, side by side in one run."""

import argparse
from pathlib import Path

from lctw_megatron.cli import run_command


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, epilog="--debug shows tracebacks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="cpu|gpu")
    cpu = commands.add_parser("cpu", help="loss, steps, attention and sparse backward on this CPU")
    cpu.add_argument("--output", default="benchmark.json", help="all numbers go there")
    cpu.add_argument("--full-head", action="store_true", help="the loss at 8,192 x 128,256 (slow)")
    gpu = commands.add_parser("gpu", help="checks and timings on one GPU, a 1B model at 32k tokens")
    gpu.add_argument("--output", default="benchmark_gpu.json", help="all numbers go there")
    gpu.add_argument("--golden", default="tests/golden/tiny_llama", help="the golden scores")
    gpu.add_argument("--only", nargs="*", default=[], help="some parts only, by name")
    options = parser.parse_args(arguments)
    if options.command == "gpu":
        from lctw_megatron.evaluation.benchmarks.gpu import gpu_benchmark

        return gpu_benchmark(Path(options.output), Path(options.golden), options.only)
    from lctw_megatron.evaluation.benchmarks.cpu import cpu_benchmark

    return cpu_benchmark(Path(options.output), options.full_head)


if __name__ == "__main__":
    run_command(main)
