"""Draw one or several runs side by side, and print how their recall and held-out losses differ.

Reads metrics.jsonl, evaluation.json and recall.json (tools/evaluate_model.py losses and recall) and
run.yaml of each run; writes PNG files and report.html, one file that holds everything. The first
run is the one to compare with.
"""

import argparse

from lctw_megatron.cli import run_command


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--debug shows tracebacks, --version the version.",
    )
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="a run's folder")
    parser.add_argument(
        "--output", metavar="DIR", help="default: `report` beside the first run's folder"
    )
    parser.add_argument(
        "--note", metavar="TEXT", help="what a reader must know, put into the page and the table"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables as Markdown, for a README"
    )
    options = parser.parse_args(arguments)

    from lctw_megatron.report.report import write_report

    print(write_report(options.runs, options.output, options.note, options.markdown))
    return 0


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
