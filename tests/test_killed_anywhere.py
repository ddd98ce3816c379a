"""kill -9 before any file operation, and the same command again: the same bytes, and nothing left.

The moments are drawn with a fixed seed. Of every command few in the ordinary suite, 40 in the long
proof; every third run is killed a second time, in the middle of mending.
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.hf_models import make_model
from tests.data.corpus_files import texts, write_corpus
from tests.file_operations import count_operations, run_killed
from tests.scoring.scene import WINDOWS, checkpoint
from tests.scoring.scorers import mixed_lengths
from tests.scoring.scorers import write_corpus as write_tokens
from tests.tokenizer_files import hf_folder, sentencepiece_model
from tests.training.layouts import make_data, make_run
from tests.training.runs import logged, write_recipe

__all__ = ["checkpoint", "hf_folder", "sentencepiece_model"]


def for_preprocess(root: Path, ask: Callable[[str], Any]) -> list[str]:
    shutil.copy(ask("sentencepiece_model"), root / "small.model")
    write_corpus(root / "in.jsonl", texts(25))
    return [
        "--input", "in.jsonl", "--output-prefix", "corpus", "--tokenizer", "small.model",
        "--validation-documents", "3",
    ]  # fmt: skip


def for_score(root: Path, ask: Callable[[str], Any]) -> list[str]:
    write_tokens(root / "corpus", mixed_lengths(60, seed=3), add_bos=True)
    shutil.copytree(ask("checkpoint"), root / "scorer")
    return ["--data", "corpus", "--checkpoint", "scorer", *WINDOWS, "--shards", "4"]


def for_train(root: Path, ask: Callable[[str], Any]) -> list[str]:
    training = {"steps": 3, "save_interval": 1, "keep_last": 1}
    prefix = make_data(root)
    model = {"num_layers": 1}
    run = make_run(prefix, "unused", {}, "pack", "dense", "frozen", training=training, model=model)
    write_recipe(root / "recipe.yaml", run)
    return ["recipe.yaml"]


def for_import(root: Path, ask: Callable[[str], Any]) -> list[str]:
    make_model("llama", root / "hf", num_hidden_layers=1, vocab_size=500)
    for path in ask("hf_folder").iterdir():
        shutil.copy(path, root / "hf")
    return ["import", "--hf", "hf", "--output", "imported"]


def for_export(root: Path, ask: Callable[[str], Any]) -> list[str]:
    assert count_operations(root, "convert", for_import(root, ask)) > 0
    return [
        "export",
        "--checkpoint",
        "imported",
        "--output",
        "exported",
        "--max-shard-size",
        "50KB",
    ]


def content(root: Path) -> dict[str, Any]:
    """Every file: its bytes, or of metrics and heartbeats what two runs have in common."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.name == "metrics.jsonl":
            found[name] = logged(path.parent)
        elif path.name == "heartbeat.json":
            found[name] = json.loads(path.read_text())["step"]
        elif path.name == ".metadata":
            found[name] = "an identifier of its own"
        elif path.name == "checkpoint.json":  # with that file's checksum
            found[name] = values = json.loads(path.read_text())
            del values["checksums"][".metadata"]
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("command", "prepare"),
    [
        ("preprocess", for_preprocess),
        ("score", for_score),
        ("train", for_train),
        ("convert", for_import),
        ("convert", for_export),
    ],
    ids=["preprocess", "score", "train", "import", "export"],
)
def test_killed_before_any_file_operation_and_started_again(
    command: str,
    prepare: Callable[[Path, Callable[[str], Any]], list[str]],
    kills: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    begin = tmp_path / "begin"
    root = tmp_path / "work"  # always the same, as paths are in manifests
    root.mkdir()
    arguments = prepare(root, request.getfixturevalue)
    shutil.copytree(root, begin)
    total = count_operations(root, command, arguments)
    expected = content(root)
    draw = random.Random(kills)
    started, dead = time.monotonic(), 0
    moments = [moment for _ in range(kills) for moment in draw.sample(range(1, total + 1), total)]
    for number in range(kills):
        shutil.rmtree(root)
        shutil.copytree(begin, root)
        for moment in [moments[number], *[draw.randint(1, total)] * (number % 3 == 2)]:
            outcome = run_killed(root, command, arguments, moment)
            assert outcome.status in (0, -signal.SIGKILL), (moment, outcome.output)
            dead += outcome.status != 0
        outcome = run_killed(root, command, arguments, 0)
        assert outcome.status == 0, (moments[number], outcome.output)
        found = content(root)
        assert found.keys() == expected.keys(), (moments[number], outcome.output)
        assert found == expected, moments[number]
    seconds = time.monotonic() - started
    print(f"\n{prepare.__name__}: {dead} kills at {total} file operations, {seconds:.0f} s")
    assert dead >= kills
