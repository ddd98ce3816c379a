"""What a model can do. Verbs: losses, recall, harness."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lctw_megatron.cli import positive, run_command
from lctw_megatron.errors import InputError

if TYPE_CHECKING:
    from lctw_megatron.config.schema import LayoutConfig

LOSSES = """Held-out loss of a checkpoint by position and by the distance of a target's last
occurrence; with --window also LongPPL and the gain from long context. Alone, or under torchrun.
Done again only if the checkpoint, the data or a setting has changed."""

RECALL = """What a checkpoint can tell at the end of a long text of facts hidden in it: nats an
answer token and the share of answers right, by task, length and depth, and with the last tokens of
the context only. Teacher-forced: one forward pass a sample, nothing is generated. Alone, or under
torchrun. Done again only if the checkpoint or a setting has changed."""

HARNESS = """Tasks of lm-evaluation-harness (pip install "lctw-megatron[harness]") on a Hugging Face
folder, or on a checkpoint that is exported first. Sets: ruler (at --lengths), longbench, and short
(MMLU, ARC, HellaSwag, BBH: what a longer context may cost). What is measured is not measured
again, unless the weights or a setting have changed."""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    verbs = {"losses": _losses, "recall": _recall, "harness": _harness}
    status = verbs[options.verb](options)

    from lctw_megatron.platform.world import shut_down

    shut_down()
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="--debug shows tracebacks, --version the version."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="losses|recall|harness")
    verb = verbs.add_parser(
        "losses",
        help="held-out loss by position and distance, LongPPL",
        description=LOSSES,
        epilog="tools/report.py draws what --output holds. --debug shows tracebacks, --version "
        "the version.",
    )
    add = verb.add_argument
    _add_checkpoint(verb)
    add("--data", metavar="PREFIX", required=True, help="held-out token dataset")
    add(
        "--output",
        metavar="FILE",
        help="default: evaluation.json in --checkpoint, where tools/report.py looks for a run's",
    )
    add(
        "--sequence-length",
        metavar="S",
        type=positive,
        help="tokens of a sequence; default: the training's, of an imported model "
        "its max_position_embeddings",
    )
    add(
        "--max-sequences",
        metavar="N",
        type=positive,
        default=32,
        help="sequences to measure, evenly spaced over the data; default: 32",
    )
    add(
        "--window",
        metavar="K",
        type=positive,
        help="tokens of the short context of LongPPL and of the gain; default: with "
        "--key-checkpoint LongPPL's own, 5120 with --stride 1024, else neither is measured",
    )
    add(
        "--stride",
        metavar="D",
        type=positive,
        help="distance between short windows; default: a quarter of --window",
    )
    add(
        "--key-checkpoint",
        metavar="DIR",
        help="the model that picks LongPPL's key tokens: give all models the same one to compare "
        "them; default: --checkpoint itself",
    )
    bound = "key tokens of LongPPL have a log p_long{} above this; default: {}"
    add("--alpha", type=float, default=2.0, help=bound.format(" - log p_short", 2))
    add("--beta", type=float, default=-2.0, help=bound.format("", -2))
    add(
        "--near",
        metavar="D",
        type=positive,
        help="a target is near if its token last stood at most D tokens back; default: --window, "
        "else a quarter of the sequence",
    )
    _add_forward(verb)
    _add_recall(
        verbs.add_parser(
            "recall",
            help="facts hidden in long texts, by length and depth",
            description=RECALL,
            epilog="tools/report.py compares what --output holds. --debug shows tracebacks, "
            "--version the version.",
        )
    )
    _add_harness(
        verbs.add_parser(
            "harness",
            help="RULER, LongBench, MMLU and other tasks of lm-evaluation-harness",
            description=HARNESS,
            epilog="--debug shows tracebacks, --version the version.",
        )
    )
    return parser


def _add_recall(verb: argparse.ArgumentParser) -> None:
    from lctw_megatron.config.schema import RecallTask

    add = verb.add_argument
    _add_checkpoint(verb)
    add(
        "--output",
        metavar="FILE",
        help="default: recall.json in --checkpoint, where tools/report.py looks for a run's",
    )
    tasks = get_args(RecallTask)
    add(
        "--lengths",
        metavar="L",
        type=positive,
        nargs="+",
        required=True,
        help="tokens that a sample gives the model to read, e.g. 4096 16384",
    )
    add(
        "--tasks",
        metavar="TASK",
        choices=tasks,
        nargs="+",
        default=list(tasks),
        help=f"of {', '.join(tasks)}; default: all",
    )
    add(
        "--depths",
        metavar="N",
        type=positive,
        default=5,
        help="places of the fact, evenly spaced from beginning to end; default: 5",
    )
    add(
        "--samples",
        metavar="N",
        type=positive,
        default=20,
        help="of each task, length and depth; default: 20",
    )
    add("--seed", metavar="N", type=int, default=0, help="of the samples; default: 0")
    add(
        "--haystack",
        metavar="FILE_OR_PREFIX",
        help="what facts are hidden in: a text file or a token dataset, better a held-out one; "
        "default: repeated sentences, for code functions. json and frequent_words have their own",
    )
    add(
        "--window",
        metavar="K",
        type=positive,
        help="tokens of the short context; default: the window of the run's weighting, else 1024",
    )
    add("--write-samples", metavar="FILE", help="write the samples as JSON lines")
    _add_forward(verb)


def _add_harness(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    model = verb.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face folder")
    model.add_argument(
        "--checkpoint", metavar="DIR", help="a run folder or a checkpoint, to be exported first"
    )
    add("--export", metavar="DIR", help="where to; default: hf in --checkpoint. An export is kept")
    add(
        "--output",
        metavar="FILE",
        help="default: harness.json in --checkpoint, where tools/report.py looks for a run's; "
        "the harness's own results go into the folder of this name without .json",
    )
    add(
        "--tasks",
        metavar="TASK",
        nargs="+",
        required=True,
        help="ruler, longbench, short; any task or group of the harness (lm_eval ls tasks); or a "
        "YAML file that defines a task, over a jsonl file for example",
    )
    add(
        "--lengths",
        metavar="L",
        type=positive,
        nargs="+",
        default=[],
        help="tokens of RULER's samples, prompt and answer, e.g. 4096 16384",
    )
    add("--limit", metavar="N", type=positive, help="questions of each task and length, for a try")
    add("--seed", metavar="N", type=int, default=0, help="of RULER's samples; default: 0")
    add("--backend", choices=["hf", "vllm"], default="hf", help="default: hf, transformers")
    add(
        "--batch-size",
        metavar="N",
        default="1",
        help="or auto; in 16 bits results depend on it a little; default: 1",
    )
    add(
        "--model-args",
        metavar="NAME=VALUE",
        nargs="+",
        default=[],
        help="further arguments of the backend, e.g. tensor_parallel_size=4",
    )
    add("--offline", action="store_true", help="ask no network; ruler is then its tasks without")
    add("--log-samples", action="store_true", help="keep what was asked and answered")


def _add_checkpoint(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="a run folder, its checkpoints or one checkpoint, trained or imported",
    )


def _add_forward(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add(
        "--tokens-per-forward",
        metavar="T",
        type=positive,
        help="sequences are run together up to this many tokens; default: 16384, on a GPU up to "
        "65536 for a small model",
    )
    add("--tensor", metavar="TP", type=positive, default=1, help="tensor-parallel ranks")
    add("--pipeline", metavar="PP", type=positive, default=1, help="pipeline stages")
    add("--context", metavar="CP", type=positive, default=1, help="context-parallel ranks")


def _layout(options: argparse.Namespace) -> "LayoutConfig":
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.config.validation_errors import build

    sizes = {name: getattr(options, name) for name in ("tensor", "pipeline", "context")}
    return build(LayoutConfig, sizes, "the options")


def _losses(options: argparse.Namespace) -> int:
    from lctw_megatron.evaluation.evaluate import EvaluationSettings, evaluate_to_file

    settings = EvaluationSettings(
        sequence_length=options.sequence_length,
        max_sequences=options.max_sequences,
        window=options.window,
        stride=options.stride,
        near=options.near,
        key_checkpoint=options.key_checkpoint,
        alpha=options.alpha,
        beta=options.beta,
        tokens_per_forward=options.tokens_per_forward,
    )
    output = options.output or Path(options.checkpoint) / "evaluation.json"
    line = evaluate_to_file(options.checkpoint, options.data, output, settings, _layout(options))
    if line:
        print(line)
    return 0


def _recall(options: argparse.Namespace) -> int:
    from lctw_megatron.config.schema import RecallProbes
    from lctw_megatron.config.validation_errors import build
    from lctw_megatron.evaluation.evaluate_recall import RecallSettings, recall_to_file
    from lctw_megatron.evaluation.recall_result import to_rows
    from lctw_megatron.report.table import to_text

    given = {name: getattr(options, name) for name in RecallProbes.model_fields}
    probes = build(RecallProbes, given, "the options").model_dump()
    probes["lengths"].sort()
    settings = RecallSettings(**probes, seed=options.seed)
    output = options.output or Path(options.checkpoint) / "recall.json"
    result = recall_to_file(
        options.checkpoint,
        output,
        settings,
        _layout(options),
        options.tokens_per_forward,
        options.write_samples,
    )
    if result:
        seconds = ", ".join(f"{t:.1f} s at {n}" for n, t in result["seconds"].items())
        print(f"{to_text(to_rows(result))}\n{output}: {seconds}")
    return 0


def _harness(options: argparse.Namespace) -> int:
    from lctw_megatron.conversion.hf_export import export_hf
    from lctw_megatron.evaluation.harness import check, harness_to_file
    from lctw_megatron.evaluation.harness_library import HarnessSettings
    from lctw_megatron.evaluation.harness_result import to_rows
    from lctw_megatron.model.checkpoint import find_checkpoint
    from lctw_megatron.report.table import to_text

    settings = HarnessSettings(
        tasks=options.tasks,
        lengths=sorted(set(options.lengths)),
        limit=options.limit,
        seed=options.seed,
        backend=options.backend,
        batch_size=options.batch_size,
        model_args=options.model_args,
        offline=options.offline or os.environ.get("HF_HUB_OFFLINE") == "1",
        log_samples=options.log_samples,
    )
    check(settings)
    if options.hf and (options.export or not options.output):
        raise InputError("--hf: needs --output and takes no --export, which --checkpoint does")
    folder, output, checkpoint = options.hf, options.output, None
    if options.checkpoint:
        checkpoint = find_checkpoint(options.checkpoint)
        folder = Path(options.export or Path(options.checkpoint) / "hf")
        export_hf(checkpoint, folder)
        output = output or Path(options.checkpoint) / "harness.json"
    result = harness_to_file(folder, output, settings, checkpoint)
    print(f"{to_text(to_rows(result))}\n{output}")
    return 0


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
