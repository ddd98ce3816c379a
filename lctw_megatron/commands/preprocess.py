"""Tokenise a corpus: PREFIX.bin, PREFIX.idx (read by unmodified Megatron-LM) and PREFIX.json."""

import argparse

from lctw_megatron.cli import positive, run_command
from lctw_megatron.config.schema import MOST_DOCUMENT_BYTES, PrepareConfig
from lctw_megatron.config.validation_errors import build
from lctw_megatron.data.preprocessing.preprocess import preprocess

EPILOG = """\
Run it again after an interruption: finished shards are taken from PREFIX.shards. The result does
not depend on --workers. --debug shows tracebacks, --version the version.

example:
  python tools/preprocess.py --input stdlib --output-prefix data/stdlib --train-sentencepiece 4096
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE|DIR|GLOB",
        help="jsonl (one document a line), txt (one document a file) or parquet (one a row), "
        "plain, .gz or .zst; folders are searched with their subfolders; `stdlib` is the installed "
        "Python standard library, one document a folder",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer",
        metavar="MODEL_OR_DIR",
        help="a SentencePiece .model file or a Hugging Face folder with tokenizer.json",
    )
    tokenizer.add_argument(
        "--train-sentencepiece",
        type=positive,
        metavar="VOCAB",
        help="train a SentencePiece model with VOCAB pieces on a sample of the corpus and save it "
        "as PREFIX.tokenizer.model",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of a jsonl line or column of a parquet file (default: text)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="count broken documents and go on, instead of stopping at the first",
    )
    parser.add_argument(
        "--max-bytes",
        type=positive,
        metavar="N",
        help="stop before the document that would bring the text above N bytes (UTF-8)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=positive,
        default=MOST_DOCUMENT_BYTES,
        metavar="N",
        help="a longer document (of jsonl: a longer line) is broken (default: 256 MiB); a process "
        "needs memory of 25 times the largest, with a Hugging Face tokenizer 150 times",
    )
    parser.add_argument(
        "--validation-documents",
        type=int,
        default=0,
        metavar="N",
        help="hold out N documents, evenly spaced, as PREFIX-validation, and their text as "
        "PREFIX-validation.jsonl",
    )
    parser.add_argument(
        "--window",
        type=positive,
        metavar="K",
        help="of the scoring to come: say so if no document is longer",
    )
    parser.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="processes (default: 2)"
    )
    return parser


def main(arguments: list[str]) -> int | None:
    options = parser().parse_args(arguments)
    if options.validation_documents < 0:
        parser().error("--validation-documents: a number from 0 on is expected")
    given = {name: getattr(options, name) for name in PrepareConfig.model_fields}
    preprocess(build(PrepareConfig, given, "the options"), options.window)
    return None


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
