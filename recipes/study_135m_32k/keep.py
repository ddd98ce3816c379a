"""Keep the numbers of the study's finished runs beside the recipe, small enough to be committed.

    keep.py runs/study_135m_32k

Of each run in it, or in a folder below, that was trained, evaluated and asked for its recall:
run.yaml, metrics.jsonl, evaluation.json and recall.json, which is what tools/report.py reads. Not
its weights, and not the page of training text in evaluation.json, whose licence is not ours. Of
`before`, which was not trained, recall.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import atomic_file
from lctw_megatron.cli import run_command
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.recall_result import read_recall
from lctw_megatron.evaluation.result_file import read_evaluation
from lctw_megatron.report.result_tables import unfinished
from lctw_megatron.report.runs import read_run

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, metavar="FOLDER", help="the output_dir")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    logs = sorted(options.runs.rglob("metrics.jsonl"))
    if not logs:
        raise InputError(f"{options.runs}: holds no run; name the recipe's output_dir")
    folders: dict[str, Path] = {}
    for folder in (log.parent for log in logs):
        if (first := folders.setdefault(folder.name, folder)) != folder:
            raise InputError(f"{folder}: a second run of this name, after {first}; rename one")
    for folder in folders.values():
        evaluation = read_evaluation(folder / "evaluation.json")
        recall = read_recall(folder / "recall.json")
        if evaluation is None or recall is None:
            print(f"{folder}: not measured, left out")
            continue
        run = read_run(folder)
        if early := unfinished([run]) or [f"{folder}: has no run.yaml."] * (run.config is None):
            print(f"{' '.join(early)} Left out.")
            continue
        kept = options.output / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        _copy(folder / "metrics.jsonl", kept)
        _copy(folder / "run.yaml", kept)
        if isinstance(evaluation.get("weights"), dict):
            evaluation["weights"]["page"] = None
        _write(kept / "evaluation.json", evaluation)
        _write(kept / "recall.json", recall)
        print(f"kept: {kept}")
    if (before := read_recall(options.runs / "before" / "recall.json")) is not None:
        kept = options.output / "before"
        kept.mkdir(parents=True, exist_ok=True)
        _write(kept / "recall.json", before)
        print(f"kept: {kept}")
    return 0


def _copy(file: Path, folder: Path) -> None:
    with atomic_file(folder / file.name) as copy:
        copy.write(file.read_bytes())


def _write(path: Path, value: dict[str, Any]) -> None:
    """A line for each entry, and for each cell of a recall."""
    with atomic_file(path, "w") as file:
        entries = [f"{json.dumps(name)}: {_lines(entry)}" for name, entry in value.items()]
        file.write("{\n" + ",\n".join(entries) + "\n}\n")


def _lines(entry: Any) -> str:
    if isinstance(entry, list) and entry and isinstance(entry[0], dict):
        return "[\n" + ",\n".join(map(json.dumps, entry)) + "\n]"
    return json.dumps(entry)


if __name__ == "__main__":
    run_command(main)
