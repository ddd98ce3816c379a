"""Score every token of a corpus under a short-context model: PREFIX.short_loss.bin, .idx, .json.

Alone, under torchrun (data-parallel ranks take shards), or as independent jobs, one for each
`--shard I/N`, and then once with `--merge`. Start it again to finish what is missing.
"""

import argparse

from lctw_megatron.cli import positive, run_command
from lctw_megatron.training.exit_status import leaving_when_asked


def _shard(text: str) -> tuple[int, int]:
    number, of = (int(part) for part in text.split("/"))
    if of < 1:
        raise argparse.ArgumentTypeError(f"{text}: N, the number of shards, is at least 1")
    if not 0 <= number < of:
        raise argparse.ArgumentTypeError(f"{text}: the shards of I/N are 0/{of} to {of - 1}/{of}")
    return number, of


_shard.__name__ = "I/N"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Losses are in nats, NaN where not scored. --debug shows tracebacks, --version the "
        "version.",
    )
    add = parser.add_argument
    add("--data", metavar="PREFIX", required=True, help="token dataset (tools/preprocess.py)")
    add(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="the scorer: a run folder, its checkpoints or one checkpoint, trained or imported",
    )
    add("--window", metavar="K", type=positive, required=True, help="tokens the scorer sees")
    add(
        "--stride",
        metavar="D",
        type=positive,
        required=True,
        help="distance between windows: targets have K-D to K tokens of context, and scoring "
        "reads the corpus K/D times",
    )
    add(
        "--sequence-length",
        metavar="S",
        type=positive,
        help="windows restart at every multiple of S too; default: only at documents",
    )
    add("--name", default="short_loss", help="of the sidecar; default: short_loss")
    add(
        "--score-first-window",
        action="store_true",
        help="score the first K tokens of a document too, where a long context is no longer than "
        "the window; wanted for a long_loss sidecar",
    )
    add(
        "--tokens-per-forward",
        metavar="T",
        type=positive,
        help="windows are run together up to this many tokens, which decides the memory; default: "
        "as begun, else 16384, on a GPU up to 65536 for a small scorer; a CPU takes at most 2048",
    )
    add(
        "--precision",
        choices=("fp32", "bf16"),
        help="of weights and products, losses are float32; default: as begun, else bf16 on a GPU, "
        "fp32 on a CPU",
    )
    add("--tensor", metavar="TP", type=positive, default=1, help="tensor-parallel ranks")
    add("--pipeline", metavar="PP", type=positive, default=1, help="pipeline stages")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--shards", metavar="N", type=positive, help="pieces of the work")
    part.add_argument(
        "--shard", metavar="I/N", type=_shard, help="score only piece I (0 to N-1) of N; no merge"
    )
    add("--merge", action="store_true", help="score nothing, only merge the finished shards")
    add(
        "--overwrite",
        action="store_true",
        help="replace a sidecar or shards that were made with other settings",
    )
    options = parser.parse_args(arguments)
    if options.merge and options.shard:
        parser.error("--merge joins all shards: it does not go with --shard")
    with leaving_when_asked():
        return _score(options)


def _score(options: argparse.Namespace) -> int:
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.config.validation_errors import build
    from lctw_megatron.platform.world import default_device, first_rank_decides, join
    from lctw_megatron.scoring.job import Job
    from lctw_megatron.scoring.score_corpus import Request, score
    from lctw_megatron.scoring.windows import Windowing

    sizes = {"tensor": options.tensor, "pipeline": options.pipeline}
    layout = build(LayoutConfig, sizes, "the options")
    windowing = Windowing(
        options.window, options.stride, options.sequence_length, options.score_first_window
    )
    join(layout)
    job = first_rank_decides(
        lambda: Job(
            options.data,
            options.checkpoint,
            windowing,
            options.name,
            layout,
            options.precision,
            options.tokens_per_forward,
            default_device().type,
        )
    )
    shard, shards = options.shard or (None, options.shards)
    request = Request(shards, shard, options.merge, options.overwrite)
    manifest = score(job, request, lambda line: print(line, flush=True))
    if manifest is None:
        return 0
    if manifest.scored:
        found = f"mean {manifest.mean:.4f}, {manifest.min:.4f} to {manifest.max:.4f} nats"
        print(f"{job.prefix}: {manifest.scored} of {manifest.values} tokens scored, {found}")
    else:
        print(
            f"{job.prefix}: nothing scored, as no document is longer than a window and its "
            "last target: weighting that compares contexts would train as uniform; score with a "
            "smaller --window"
        )
    return 0


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
