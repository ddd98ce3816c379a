"""Print what token datasets and their sidecars are, check them, and look into them.

Without a view: the manifests. The views compute weights from the sidecars long_loss and short_loss,
so that any scheme can be looked at without a model.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from lctw_megatron.cli import positive, run_command
from lctw_megatron.config.schema import MOST_TOKENS
from lctw_megatron.data.manifest import check_prefix
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import few
from lctw_megatron.inspection.describe_data import (
    describe,
    describe_sidecar,
    make_manifest,
    sidecar_names,
)
from lctw_megatron.inspection.output_files import check_output

EPILOG = """\
examples:
  python tools/inspect_data.py PREFIX --verify
  python tools/inspect_data.py PREFIX --document 3 --weighting sparse --html page.html
  python tools/inspect_data.py PREFIX --sequence 0 --sequence-length 8192 --by difference
  python tools/inspect_data.py PREFIX --document 3 --checkpoint RUN_DIR --window 256
  python tools/inspect_data.py PREFIX --statistics --top 50 --sequence-length 8192
  python tools/inspect_data.py PREFIX --rank-documents ranking.jsonl
  python tools/inspect_data.py PREFIX --rank-documents ranking.jsonl --keep 0.5 \\
      --output-prefix PREFIX-half
  python tools/inspect_data.py RUN_DIR --step 100
A corpus that Megatron's own preprocessing made needs a manifest first:
  python tools/inspect_data.py PREFIX --write-manifest --tokenizer MODEL_OR_DIR
Long losses come from the same command as short ones:
  python tools/score.py --data PREFIX --checkpoint DIR --name long_loss --window S --stride D \\
      --score-first-window
--debug shows tracebacks, --version the version.
"""


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


_count.__name__ = "whole number"  # argparse names it in its error


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


_share.__name__ = "share (above 0, at most 1)"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prefix", nargs="+", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    add("--verify", action="store_true", help="read everything and compare the fingerprints")
    add(
        "--write-manifest",
        action="store_true",
        help="write PREFIX.json for a corpus in Megatron format; needs --tokenizer",
    )
    add(
        "--tokenizer",
        metavar="MODEL_OR_DIR",
        help="the SentencePiece .model file or Hugging Face folder that made the tokens; for "
        "views only if it is no longer where it was",
    )
    _add_views(parser.add_argument_group("views").add_argument)
    _add_weighting(parser.add_argument_group("sequences and weights").add_argument)
    return parser


def _add_views(add: Callable[..., Any]) -> None:
    add("--document", metavar="N", type=_count, help="document N as coloured text")
    add("--sequence", metavar="N", type=_count, help="training sequence N as coloured text")
    add(
        "--top",
        metavar="N",
        type=_count,
        default=0,
        help="the N largest targets with their contexts: of the document or sequence, else of all",
    )
    add("--statistics", action="store_true", help="of differences and weights, likewise")
    add(
        "--sample",
        metavar="N",
        type=positive,
        help="of all: only N sequences, evenly spaced (a million targets take a few seconds)",
    )
    add(
        "--rank-documents",
        metavar="FILE",
        help="documents by their mean gain from long context, best first, as JSON lines",
    )
    add(
        "--keep",
        metavar="SHARE",
        type=_share,
        help="with --rank-documents: write this share of the ranked documents, the best, as a "
        "dataset with its sidecars",
    )
    add("--output-prefix", metavar="PREFIX", help="of --keep, for a recipe's data.train")
    add(
        "--step",
        metavar="N",
        type=_count,
        help="PREFIX is a run's folder: what step N, counted from 0, read",
    )
    add("--html", metavar="FILE", help="write the view as one HTML file too")
    add("--png", metavar="FILE", help="draw the first page of the text as a picture too")
    add(
        "--by",
        choices=("weight", "score", "difference", "long_loss", "short_loss"),
        default="weight",
        help="what colours and ranks; difference is short - long loss; default: weight",
    )
    add("--offset", metavar="N", type=_count, default=0, help="text: skip the first N targets")
    add("--tokens", metavar="N", type=positive, default=2000, help="text: N targets; default: 2000")
    add("--color", choices=("auto", "always", "never"), default="auto", help="of text")


def _add_weighting(add: Callable[..., Any]) -> None:
    add(
        "--sequence-length",
        metavar="S",
        type=positive,
        help="weigh sequences of S tokens, as training does; default: whole documents",
    )
    add("--packing", choices=("chunk", "pack"), default="chunk", help="default: chunk")
    add("--tails", choices=("drop", "keep"), default="keep", help="default: keep")
    add("--index-cache", metavar="DIR", help="default: index_cache beside the dataset")
    add(
        "--weighting",
        metavar="NAME",
        default="dense",
        help="a fragment of configs/weightings or a .yaml file; default: dense",
    )
    add(
        "--set",
        metavar="FIELD=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="change a field of the weighting, e.g. interpolation=0",
    )
    add(
        "--near",
        metavar="D",
        type=positive,
        help="statistics: near is at most D tokens back; default: a quarter of S, else 1024",
    )
    add("--long", metavar="NAME", default="long_loss", help="sidecar; default: long_loss")
    add("--short", metavar="NAME", default="short_loss", help="sidecar; default: short_loss")
    add(
        "--checkpoint",
        metavar="DIR",
        help="this model gives the long losses, of a document or sequence",
    )
    add(
        "--window",
        metavar="K",
        type=positive,
        help="with --checkpoint: it gives the short losses too, from K tokens",
    )
    add("--stride", metavar="D", type=positive, help="of --window; default: a quarter of it")


def main(arguments: list[str]) -> int | None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.write_manifest and options.tokenizer is None:
        parser.error("--write-manifest needs --tokenizer")
    look = options.top or options.statistics
    text = options.document is not None or options.sequence is not None
    if options.checkpoint and not text:
        parser.error("--checkpoint is for --document and --sequence; score the data for the rest")
    if (options.window or options.stride) and not options.checkpoint:
        parser.error("--window and --stride need --checkpoint")
    if options.stride and not options.window:
        parser.error("--stride needs --window")
    if options.png and not text:
        parser.error("--png is for --document and --sequence")
    if options.html and not (look or text):
        parser.error("--html is for --document, --sequence, --top and --statistics")
    if options.document is not None and options.sequence is not None:
        parser.error("--document or --sequence, not both")
    if options.rank_documents and (look or text):
        parser.error("--rank-documents is a view of its own")
    if (options.keep is None) != (options.output_prefix is None):
        parser.error("--keep and --output-prefix go together")
    if options.keep is not None and not options.rank_documents:
        parser.error("--keep is for --rank-documents")
    view = look or text or options.rank_documents or options.step is not None
    if view and (options.verify or options.write_manifest):
        parser.error("--verify and --write-manifest go without a view")
    if options.overrides and not (look or text):
        parser.error("--set is for --document, --sequence, --top and --statistics")
    if view and len(options.prefix) > 1:
        parser.error("a view takes one PREFIX")
    if (options.sequence_length or 0) > MOST_TOKENS:
        parser.error(f"--sequence-length: a sequence has at most {MOST_TOKENS} tokens")
    if options.step is not None and (look or text or options.rank_documents):
        parser.error("--step is a view of its own")
    if unused := _unused(options, parser, bool(text), bool(look)):
        parser.error(f"{few(unused)}: of no use to what is asked for; leave it out")
    if options.output_prefix is not None:
        check_prefix(options.output_prefix)
    prefixes, sidecars = options.prefix, (options.long, options.short)
    for name in ("rank_documents", "html", "png"):
        if output := getattr(options, name):
            check_output(f"--{name.replace('_', '-')}", output, prefixes, sidecars)
    if options.step is not None:
        from lctw_megatron.inspection.step_documents import describe_step

        print(describe_step(options.prefix[0], options.step))
    elif options.rank_documents:
        from lctw_megatron.inspection.rank_documents import describe_ranking, rank_documents

        dataset = TokenDataset(options.prefix[0])
        long, short = Sidecar(dataset, options.long), Sidecar(dataset, options.short)
        ranking = rank_documents(dataset, long, short, options.rank_documents)
        print(f"{describe_ranking(ranking)}\n{options.rank_documents}")
        if options.keep is not None:
            from lctw_megatron.inspection.choose_documents import choose_documents

            print(choose_documents(ranking, long, short, options.keep, options.output_prefix))
    elif view:
        _show_tokens(options)
    else:
        _print_manifests(options)
    return None


def _unused(
    options: argparse.Namespace, parser: argparse.ArgumentParser, text: bool, look: bool
) -> list[str]:
    """What was given and would be passed over without a word."""
    tokens = text or look
    losses = tokens or bool(options.rank_documents)
    used = {
        "by": text or bool(options.top),
        "offset": text,
        "tokens": text,
        "near": options.statistics,
        "sample": look and not text,
        "long": losses and not options.checkpoint,
        "short": losses and not options.window,
        "tokenizer": tokens or options.write_manifest,
        **dict.fromkeys(("sequence_length", "weighting"), tokens),
        **dict.fromkeys(
            ("packing", "tails", "index_cache"),
            tokens and bool(options.sequence_length or options.checkpoint),
        ),
    }
    given = (name for name in used if getattr(options, name) != parser.get_default(name))
    return [f"--{name.replace('_', '-')}" for name in given if not used[name]]


def _show_tokens(options: argparse.Namespace) -> None:
    from lctw_megatron.inspection.inspect_tokens import Inspection, View, write_page
    from lctw_megatron.inspection.scored_tokens import (
        ScoredTokens,
        SequenceSettings,
        open_with_model,
        read_weighting,
    )

    dataset = TokenDataset(options.prefix[0])
    weighting = read_weighting(options.weighting, options.overrides)
    settings = SequenceSettings(
        options.sequence_length, options.packing, options.tails, options.index_cache
    )
    if options.checkpoint:
        windows = (options.window, options.stride) if options.window else None
        scored = open_with_model(
            dataset, weighting, settings, options.checkpoint, windows, options.short, options.by
        )
    else:
        names = options.long, options.short
        scored = ScoredTokens(dataset, weighting, settings, *names, by=options.by)
    view = View(
        document=options.document,
        sequence=options.sequence,
        by=options.by,
        offset=options.offset,
        tokens=options.tokens,
        png=options.png,
        top=options.top,
        statistics=options.statistics,
        sample=options.sample,
        near=options.near,
    )
    terminal = sys.stdout.isatty() if options.color == "auto" else options.color == "always"
    text, sections = Inspection(scored, options.tokenizer).show(view, terminal)
    print(text)
    if options.html:
        write_page(options.html, dataset.prefix, sections)
        print(options.html)


def _print_manifests(options: argparse.Namespace) -> None:
    for prefix in options.prefix:
        if options.write_manifest:
            make_manifest(prefix, options.tokenizer)
        dataset = TokenDataset(prefix)
        print(describe(dataset))
        if options.verify:
            dataset.verify()
            print("  verified                 every token and length")
        for name in sidecar_names(dataset):
            sidecar = Sidecar(dataset, name)
            print(describe_sidecar(sidecar))
            if options.verify:
                sidecar.verify()
                print("  verified                 every value and length")


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
