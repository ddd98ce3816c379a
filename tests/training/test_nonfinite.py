"""A step that goes wrong is stopped before a weight changes, and the right document is named."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.fingerprint import sample_digest
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.sidecar import SidecarWriter
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.errors import InputError
from lctw_megatron.training.loss_spike import SpikeWatch
from tests.distributed import run_distributed
from tests.tools.command import call
from tests.training.layouts import STRIDE, VOCABULARY, WINDOW, make_run
from tests.training.runs import checkpoints, logged, write_recipe
from tests.training.trainers import train
from tools import inspect_data

MARK = VOCABULARY - 1
"""A token of one document only: where the test does harm."""
DOCUMENT = 17


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 documents of one sequence each; one has the mark in it."""
    rng = np.random.default_rng(3)
    prefix = str(tmp_path_factory.mktemp("trouble") / "tokens")
    tokenizer = TokenizerIdentity(
        kind="sentencepiece", path="none", digest="0", vocab_size=VOCABULARY,
        bos_id=1, eos_id=2, add_bos=True, add_eos=True,
    )  # fmt: skip
    with TokenWriter(prefix, tokenizer) as writer:
        for number in range(40):
            tokens = rng.integers(3, MARK, 65).astype(np.uint16)
            if number == DOCUMENT:
                tokens[30] = MARK
            writer.add(tokens)
    details = dict(
        window=WINDOW, stride=STRIDE, sequence_length=None, score_first_window=False,
        min_context=4, mean_context=8.0, scorer={},
    )  # fmt: skip
    with SidecarWriter(TokenDataset(prefix), "short_loss", **details) as writer:
        for _ in range(40):
            values = rng.gamma(2.0, 2.0, 65).astype(np.float32)
            values[:WINDOW] = np.nan
            writer.add(values)
    return prefix


def make(data: str, folder: Path, scheme: str = "uniform", **training: Any) -> RunConfig:
    settings = {"steps": 5} | training  # 5 steps of 8 sequences: every document once
    return make_run(data, str(folder), {}, "chunk", scheme, "frozen", training=settings)


@contextmanager
def harm(kind: str, first: int = 0) -> Iterator[None]:
    """From step ``first`` on: nan: the marked token's embedding is NaN. spike: the last hidden
    states of the sequence with the mark are 20 times as large, and so are its logits.
    """
    from lctw_megatron.training import loop
    from lctw_megatron.training.step import Stepper

    build, step = loop.build_model, Stepper.step
    at = 0
    marked = torch.zeros(0)

    def counting_step(self: Stepper, number: int, batches: Any) -> dict[str, float]:
        nonlocal at
        at = number
        return step(self, number, batches)

    def embedded(module: Any, inputs: Any, named: dict[str, Any], output: Any) -> Any:
        nonlocal marked
        marked = (named["input_ids"] == MARK).T.unsqueeze(-1)  # [s, b, 1], as the output
        return output.masked_fill(marked, float("nan")) if kind == "nan" and at >= first else output

    def decoded(module: Any, inputs: Any, output: Any) -> Any:
        times = 1 + 19 * marked.any(0, keepdim=True)
        return output * times if kind == "spike" and at >= first else output

    def build_harmed(*arguments: Any, **settings: Any) -> Any:
        chunks = build(*arguments, **settings)
        chunks[0].embedding.register_forward_hook(embedded, with_kwargs=True)
        chunks[0].decoder.register_forward_hook(decoded)
        return chunks

    with (
        mock.patch.object(loop, "build_model", build_harmed),
        mock.patch.object(Stepper, "step", counting_step),
    ):
        yield


def train_into_trouble(run: RunConfig) -> tuple[str, int, bool]:
    """The error of a run with a NaN, its step, and whether a weight had changed in that step."""
    from lctw_megatron.training.loop import Trainer

    before: dict[str, torch.Tensor] = {}
    steps = []

    with harm("nan"):
        trainer = Trainer(run)
        real = trainer.stepper.step

        def step(number: int, batches: Any) -> dict[str, float]:
            steps.append(number)
            before.update({n: p.detach().clone() for n, p in trainer.chunks[0].named_parameters()})
            return real(number, batches)

        trainer.stepper.step = step
        try:
            trainer.run_to_end()
        except InputError as error:
            after = dict(trainer.chunks[0].named_parameters())
            changed = any(not before[name].equal(after[name]) for name in after)
            return str(error), steps[-1], changed
        finally:
            trainer.close()
    return "", -1, False


def read_step(run: RunConfig, capsys: pytest.CaptureFixture[str], step: int) -> str:
    """inspect_data.py RUN_DIR --step N"""
    answer = call(inspect_data.main, capsys, run.run_dir, "--step", step)
    assert answer.status == 0, answer.err
    return answer.out


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nan_in_one_documents_activations_stops_all_ranks_and_names_it(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    run = make(data, tmp_path)
    answers = (
        run_distributed(train_into_trouble, 2, run) if ranks == 2 else [train_into_trouble(run)]
    )
    message, step, _ = answers[0]
    assert all(answer[1:] == (step, False) for answer in answers)
    assert f"(documents {DOCUMENT}) is not finite on rank " in message, message
    path = tmp_path / f"nonfinite_step_{step:08d}.json"
    assert str(path) in message and "no weight was changed" in message
    found = json.loads(path.read_text())
    assert [[p["document"] for p in s["pieces"]] for s in found["sequences"]] == [[DOCUMENT]]
    assert len(found["ranks"]) == 1 and found["step"] == step
    assert len(logged(tmp_path)) == step
    # What the step had read can be asked for afterwards, too.
    assert re.search(rf"\b{DOCUMENT}\b", read_step(run, capsys, step))


def test_a_budget_leaves_such_steps_out(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lctw_megatron.training.loop import train as train_here

    with harm("nan"):
        assert train_here(make(data, tmp_path, nonfinite_budget=1)) == 0
    assert "(left out, 1 of training.nonfinite_budget=1)" in capsys.readouterr().out
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == list(range(5))
    assert sum("skipped" in line for line in lines) == 1
    # The next epoch meets the document again: the budget is used up.
    with harm("nan"), pytest.raises(InputError, match=f"documents {DOCUMENT}"):
        train_here(make(data, tmp_path / "longer", nonfinite_budget=1, steps=10))
    # As it is after a resume: what was left out before counts.
    with harm("nan"), pytest.raises(InputError, match=f"documents {DOCUMENT}"):
        train_here(make(data, tmp_path, nonfinite_budget=1, steps=10))


def train_with_a_lost_weight(run: RunConfig, lost: bool) -> str:
    """The error of a run of which, after four steps, the last rank's copy of a weight is NaN."""
    from lctw_megatron.training.loop import train as train_here
    from lctw_megatron.training.step import Stepper

    real = Stepper.step

    def step(self: Stepper, number: int, batches: Any) -> dict[str, float]:
        metrics = real(self, number, batches)
        if lost and number == 3 and dist.get_rank() == dist.get_world_size() - 1:
            next(self.chunks[0].parameters()).data.view(-1)[-1] = float("nan")
        return metrics

    try:
        with mock.patch.object(Stepper, "step", step):
            train_here(run)
    except InputError as error:
        return str(error)
    except SystemExit as quiet:
        return f"status {quiet.code}"
    return ""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("in_background", [False, True])
def test_weights_that_are_not_finite_are_never_saved(
    data: str, tmp_path: Path, ranks: int, in_background: bool
) -> None:
    """They would take the place of good ones, and every start from there would stop at once."""
    run = make(data, tmp_path, save_interval=2, keep_last=1, async_save=in_background)

    def errors(lost: bool) -> list[str]:
        if ranks == 1:
            return [train_with_a_lost_weight(run, lost)]
        return run_distributed(train_with_a_lost_weight, ranks, run, lost)

    first, *others = errors(lost=True)
    assert "step_00000004: not written, as numbers of " in first and "not finite" in first, first
    assert others == ["status 2"] * (ranks - 1)
    assert checkpoints(tmp_path) == [2]
    assert errors(lost=False) == [""] * ranks
    assert checkpoints(tmp_path) == [5]
    assert [line["step"] for line in logged(tmp_path)] == list(range(5))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_corrupt_value_of_the_sidecar_stops_and_is_named(
    data: str, tmp_path: Path, ranks: int
) -> None:
    prefix = f"{data}.short_loss"
    before = {path: path.read_bytes() for path in map(Path, (f"{prefix}.bin", f"{prefix}.json"))}
    values = np.frombuffer(before[Path(f"{prefix}.bin")], np.float32).copy()
    values[DOCUMENT * 65 + 40] = np.inf
    recipe = write_recipe(tmp_path / "recipe.yaml", make(data, tmp_path, "dense"))
    try:
        Path(f"{prefix}.bin").write_bytes(values.tobytes())
        outcome = train(recipe, ranks)
        assert outcome.status == 2 and "sample_digest is " in outcome.output  # seen when opened
        # In a large file, the damage may lie where opening it does not look.
        manifest = json.loads(before[Path(f"{prefix}.json")])
        manifest["sample_digest"] = sample_digest(prefix)
        Path(f"{prefix}.json").write_text(json.dumps(manifest))
        outcome = train(recipe, ranks)
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.output
    assert f"token 40 of document {DOCUMENT} is inf" in errors[0]
    assert len(logged(tmp_path / "main")) < 5


def test_a_loss_spike_is_reported_with_its_documents(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lctw_megatron.training.loop import train as train_here

    run = make(data, tmp_path, steps=25)  # the last five are an epoch: each document once
    with harm("spike", first=20):
        assert train_here(run) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "loss spike to" in line]
    (path,) = tmp_path.glob("spike_step_*.json")
    found = json.loads(path.read_text())
    documents = sorted(p["document"] for s in found["sequences"] for p in s["pieces"])
    assert found["step"] >= 20 and DOCUMENT in documents and len(documents) == 8
    assert line.startswith(f"step {found['step']}: loss spike") and str(documents) in line
    assert re.search(rf"\b{DOCUMENT}\b", read_step(run, capsys, found["step"]))


def test_what_a_spike_is() -> None:
    watch = SpikeWatch()
    losses = [3.0 + 0.01 * (step % 5) for step in range(16)]
    assert not any(watch.is_spike(loss) for loss in losses)
    assert not watch.is_spike(3.25)  # less than 0.3 nats
    assert watch.is_spike(3.4)
    assert watch.is_spike(3.4)  # still: one such step does not move the median
    noisy = SpikeWatch()
    assert not any(noisy.is_spike(3.0 + (step % 2)) for step in range(16))
    assert not noisy.is_spike(5.0)  # as far off as noise goes
    assert not SpikeWatch().is_spike(100.0)  # nothing to compare with yet
