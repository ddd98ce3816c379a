"""Two ranks of which the second sees nothing of what the first has written: the first decides.

On a shared file system files appear on other nodes late, up to a minute on NFS. Here the second
rank's code asks in vain whether anything of the run, its checkpoint, its tokenizer and its results
is there, and may not read what says so, while it is told what the first rank has found.
"""

import builtins
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.training.exit_status import REQUEUE_STATUS
from tests.distributed import run_distributed
from tests.tokenizer_files import hf_folder, real_text
from tests.training.runs import sigterm_after
from tests.training.test_recall import make_run

__all__ = ["hf_folder"]  # a fixture

DECIDING = ("checkpoint.json", "evaluation.json", "recall.json", "tokenizer.json")
"""Files that nothing is read from but what all ranks must agree on."""


@contextmanager
def late_files(folder: Path) -> Iterator[None]:
    """For lctw_megatron in this process nothing below ``folder`` is there yet; libraries, which
    only read what they were told to, see all."""

    def hidden(path: Any, depth: int = 2) -> bool:
        asks = sys._getframe(depth).f_globals.get("__name__", "")
        below = str(path).startswith(f"{folder}{os.sep}")
        return below and asks.startswith("lctw_megatron.")

    def blind(real: Callable[..., Any], nothing: Any) -> Callable[..., Any]:
        def ask(path: Any, *arguments: Any, **options: Any) -> Any:
            return nothing if hidden(path) else real(path, *arguments, **options)

        return ask

    def read(real: Callable[..., Any]) -> Callable[..., Any]:
        def open_file(path: Any, *arguments: Any, **options: Any) -> Any:
            if Path(str(path)).name in DECIDING and (hidden(path) or hidden(path, 3)):
                raise FileNotFoundError(2, "not there yet", str(path))
            return real(path, *arguments, **options)

        return open_file

    with ExitStack() as held:
        for name, nothing in [
            ("exists", False), ("is_file", False), ("is_dir", False), ("iterdir", ()), ("glob", ()),
        ]:  # fmt: skip
            real = getattr(Path, name)
            held.enter_context(mock.patch.object(Path, name, blind(real, nothing)))
        for place in (builtins, io):
            held.enter_context(mock.patch.object(place, "open", read(place.open)))
        yield


def second_rank_late(data: str, folder: str) -> dict[str, float]:
    """Train, resume, begin from a start, evaluate, evaluate again: what this rank has got."""
    from lctw_megatron.commands.score import main as score
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.evaluation.evaluate import EvaluationSettings, evaluate, evaluate_to_file
    from lctw_megatron.evaluation.evaluate_recall import RecallSettings, recall_to_file
    from lctw_megatron.training.loop import train

    root, first = Path(folder), dist.get_rank() == 0
    recall = {"lengths": [256], "samples": 2, "every": 1}

    def run(name: str, **changes: Any) -> RunConfig:
        return make_run(data, root / name, recall).model_copy(update=changes)

    with sigterm_after(2):
        assert train(run("one")) == REQUEUE_STATUS
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with nullcontext() if first else late_files(root):
        assert train(run("one")) == 0
        if first:
            (root / "tokenizer").rename(root / "gone")  # the start's is taken instead
        assert train(run("two", start=str(root / "one/checkpoints"))) == 0
        settings = EvaluationSettings(max_sequences=2, window=16, stride=8)
        checkpoint, output = root / "one", root / "evaluation.json"
        result = {"loss": evaluate(checkpoint, data, settings)["loss"]}
        asked = RecallSettings(["one_key"], [256], depths=1, samples=1, window=128)
        for _ in range(2):  # the second time all is there
            line = evaluate_to_file(checkpoint, data, output, settings)
            found = recall_to_file(checkpoint, root / "recall.json", asked, LayoutConfig(), 1024)
            assert (line is not None) == (found is not None) == first
        arguments = ["--data", data, "--checkpoint", str(checkpoint), "--window", "32"]
        assert score([*arguments, "--stride", "16", "--shards", "4"]) in (0, None)
    return result


def test_resume_start_and_evaluation_are_decided_by_the_first_rank(
    tmp_path: Path,
    hf_folder: Path,  # noqa: F811
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(hf_folder, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    with TokenWriter(str(tmp_path / "tokens"), tokenizer.identity) as writer:
        for document in tokenizer.encode_documents([real_text()]):
            writer.add(document)
    first, second = run_distributed(second_rank_late, 2, str(tmp_path / "tokens"), str(root))
    assert first == second
    lines = (root / "one/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert (root / "two/tokenizer/tokenizer.json").is_file()
    assert Sidecar(TokenDataset(str(tmp_path / "tokens"))).manifest.scored
    assert json.loads((root / "evaluation.json").read_text())["loss"] == first["loss"]
