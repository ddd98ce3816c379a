"""Compare runs: is one better, where, and what did it cost?

Reads metrics.jsonl, run.yaml and what tools/evaluate_model.py wrote (evaluation.json, recall.json,
harness.json) of each run; prints tables and writes PNG files and report.html, one file that holds
everything. Runs that differ only in their seed are one line, with the spread over seeds in its
errors. All are compared with the baseline, sample by sample where both were measured on the same;
only what is beyond two standard errors is called better or worse.
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
        "--baseline",
        metavar="RUN_DIR",
        help="the run to compare with, and others of its kind; default: the first",
    )
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

    print(
        write_report(options.runs, options.output, options.note, options.markdown, options.baseline)
    )
    return 0


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
