"""A tiny trained checkpoint, measured under several layouts and against losses from its logits.

Longer than 350 lines: one run is trained for all of it.
"""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from lctw_megatron.commands import evaluate_model, inspect_data
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation import model_losses
from lctw_megatron.evaluation.evaluate import (
    EvaluationSettings,
    evaluate,
    evaluate_to_file,
    open_held_out,
)
from lctw_megatron.evaluation.model_losses import ModelLosses
from lctw_megatron.inspection import step_documents as step_documents_module
from lctw_megatron.inspection.step_documents import describe_step, step_documents
from lctw_megatron.model.checkpoint import agreed_checkpoint, find_checkpoint, read_manifest
from lctw_megatron.report.report import write_report
from tests.distributed import run_distributed
from tests.evaluation.tiny_run import MODEL, SEQUENCE, STRIDE, WINDOW, make_data, make_run

SETTINGS = EvaluationSettings(max_sequences=6, window=WINDOW, stride=STRIDE, alpha=0.0, beta=-9.0)
LAYOUTS = [{}, {"context": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]


def train_and_evaluate(
    folder: str, train: str, validation: str, **changes: Any
) -> list[dict[str, Any]]:
    """On two ranks: a run of four steps, then its evaluation under every layout."""
    from lctw_megatron.training.loop import train as train_run

    run = make_run(Path(folder), train, validation, **changes)
    assert train_run(run) == 0
    return [
        evaluate(run.run_dir, validation, SETTINGS, LayoutConfig(**layout)) for layout in LAYOUTS
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str, list[list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("run")
    train, validation = make_data(folder)
    results = run_distributed(train_and_evaluate, 2, str(folder), train, validation)
    return folder, validation, results


def close(ours: Any, theirs: Any) -> None:
    """Equal structure, numbers to 1e-5 relative (float32 sums in another order)."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            close(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
    elif isinstance(ours, float):
        assert math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=2e-4), (ours, theirs)
    else:
        assert ours == theirs


def test_every_rank_and_every_layout_gives_the_same_evaluation(trained):
    _, _, results = trained
    first = results[0][0]
    for rank in results:
        for result in rank:
            close(result, first)
    assert first["targets"] == 6 * SEQUENCE
    assert first["longppl"]["key_tokens"] > 0


def evaluate_experts(folder: str, train: str, validation: str) -> tuple[list[Any], list[int]]:
    """Also how many experts a rank held under each of LAYOUTS."""
    held = []
    load = model_losses.load_weights

    def seen(chunks: list[Any], *arguments: Any) -> None:
        load(chunks, *arguments)
        held.append(len(chunks[0].decoder.layers[0].mlp.experts.local_experts))

    changes = {"model": MODEL | {"num_moe_experts": 4}, "layout": {"expert": 2}}
    with mock.patch.object(model_losses, "load_weights", seen):
        return train_and_evaluate(folder, train, validation, **changes), held


def test_experts_are_shared_out_among_the_ranks_of_a_sequence(trained, tmp_path):
    folder, validation, _ = trained
    arguments = (str(tmp_path), str(folder / "train"), validation)
    for results, held in run_distributed(evaluate_experts, 2, *arguments):
        assert held == [4, 2, 2, 4]
        for result in results:
            close(result, results[0])


def test_losses_are_those_of_the_logits(trained):
    """Position and distance are looked up token by token; short losses window by window."""
    from lctw_megatron.evaluation.model_losses import ModelLosses

    folder, validation, results = trained
    found = results[0][0]
    dataset = TokenDataset(validation)
    bos = dataset.manifest.tokenizer.bos_id
    model = ModelLosses(folder / "run", LayoutConfig(), SEQUENCE)

    def losses(tokens: list[int], labels: list[int]) -> np.ndarray:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = model.chunks[0](ids, torch.arange(len(tokens))[None], None)
        logits = logits[0, :, : model.manifest.model.vocab_size].double()
        return torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels), reduction="none"
        ).numpy()

    by_class: dict[str, list[float]] = {"near": [], "far": [], "first_seen": []}
    gains: dict[str, list[float]] = {"near": [], "far": [], "first_seen": []}
    at_first = []
    for document, offset in found["sequences"]:
        ids = dataset.get(document, offset, SEQUENCE + 1).tolist()
        tokens, labels = ids[:-1], ids[1:]
        if offset > 0:
            tokens[0] = bos
        long_loss = losses(tokens, labels)
        at_first.append(long_loss[0])
        kinds = []
        for i, label in enumerate(labels):
            places = [j for j in range(i + 1) if tokens[j] == label]
            kind = "first_seen" if not places else "far" if i + 1 - places[-1] > WINDOW else "near"
            kinds.append(kind)
            by_class[kind].append(long_loss[i])
        # The first window has no shorter context; the later ones score what none before them did.
        previous_end = WINDOW
        for start in range(STRIDE, SEQUENCE + 1 - WINDOW, STRIDE):
            # The last window's last input predicts the last token, too.
            end = start + WINDOW + (start + WINDOW == SEQUENCE)
            short_loss = losses([bos, *ids[start + 1 : end - 1]], ids[start + 1 : end])
            for target in range(previous_end, end):
                gain = short_loss[target - start - 1] - long_loss[target - 1]
                gains[kinds[target - 1]].append(gain)
            previous_end = end
    classes = found["classes"]
    for at, name in enumerate(classes["bins"]):
        assert classes["targets"][at] == len(by_class[name])
        assert classes["loss"][at] == pytest.approx(np.mean(by_class[name]), rel=1e-5)
        assert classes["gain"][at] == pytest.approx(np.mean(gains[name]), abs=1e-5)
    every_loss, every_gain = sum(by_class.values(), []), sum(gains.values(), [])
    assert found["loss"] == pytest.approx(np.mean(every_loss), rel=1e-5)
    assert found["position"]["loss"][0] == pytest.approx(np.mean(at_first), rel=1e-5)
    assert len(every_gain) == 6 * (SEQUENCE + 1 - WINDOW)
    assert found["longppl"]["key_tokens"] == sum(value > 0 for value in every_gain)


def test_the_weight_sample_is_of_the_last_step(trained):
    folder, _, results = trained
    sample = results[0][0]["weights"]
    assert sample["sequences"] == 4 and sample["weighting"]["scheme"] == "dense"
    assert sample["statistics"]["mean"] == pytest.approx(1, rel=1e-4)
    weight = np.array(sample["histogram"]["weight"])
    assert weight.sum() == pytest.approx(sum(sample["classes"]["weight"]), rel=1e-6)
    assert weight.sum() == pytest.approx(sample["targets"], rel=1e-4)
    page = sample["page"]
    last = step_documents(folder / "run", 3)
    assert any(page["document"] == traced.pieces[-1].document for traced in last)
    assert len(page["text"]) == len(page["weight"]) <= SEQUENCE
    lowest = min(page["weight"])
    assert lowest >= 0.2  # lambda


def test_the_page_is_the_end_of_a_sequence_with_its_own_weights(trained, monkeypatch):
    from lctw_megatron.data.token_text import TokenTexts
    from lctw_megatron.evaluation import weight_sample
    from lctw_megatron.evaluation.model_losses import ModelLosses

    folder, _, results = trained
    whole = results[0][0]["weights"]["page"]
    monkeypatch.setattr(weight_sample, "PAGE_TARGETS", 10)
    model = ModelLosses(folder / "run", LayoutConfig(), SEQUENCE)
    place = model.checkpoint, model.manifest
    page = weight_sample.sample_or_reason(*place, WINDOW, 4, lambda: model)["page"]
    assert page["text"] == whole["text"][-10:]
    close(page["weight"], whole["weight"][-10:])
    assert page["first_target"] == whole["first_target"] + len(whole["text"]) - 10
    document = TokenDataset(folder / "train").get(page["document"], page["first_target"], 10)
    texts = TokenTexts(load_tokenizer(folder / "spm.model"))
    assert page["text"] == texts(document)


def test_a_tokenizer_that_was_replaced_is_not_taken_for_the_checkpoints(trained):
    folder, _, _ = trained
    manifest = read_manifest(find_checkpoint(folder / "run"))
    there = model_losses.tokenizer_of(folder / "no_files_of_its_own", manifest)
    assert there.identity.digest == manifest.tokenizer["digest"]
    other = SimpleNamespace(tokenizer={**manifest.tokenizer, "digest": "other"})
    with pytest.raises(InputError, match=r"spm\.model: its digest is .* was trained with other"):
        model_losses.tokenizer_of(folder / "no_files_of_its_own", other)


def test_a_function_that_a_checkpoint_names_is_shown_and_not_imported(trained):
    from lctw_megatron.evaluation.weight_sample import sample_or_reason

    trained_run = read_manifest(find_checkpoint(trained[0] / "run")).run
    custom = trained_run.weighting.model_copy(
        update={"scheme": "custom", "function": "antigravity:fly"}
    )
    run = trained_run.model_copy(update={"weighting": custom})
    manifest = SimpleNamespace(run=run)
    reason = sample_or_reason(Path("none"), manifest, WINDOW, 4, pytest.fail)
    assert "antigravity:fly" in reason
    assert "antigravity" not in sys.modules


def test_tools_from_checkpoint_to_report(trained, capsys):
    folder, validation, results = trained
    run = str(folder / "run")
    arguments = ["losses", "--checkpoint", run, "--data", validation, "--max-sequences", "6"]
    arguments += ["--window", str(WINDOW), "--stride", str(STRIDE), "--alpha", "0", "--beta", "-9"]
    assert evaluate_model.main(arguments) == 0
    path = folder / "run" / "evaluation.json"
    close(json.loads(path.read_text()), json.loads(json.dumps(results[0][0])))
    written = path.stat().st_mtime_ns
    assert evaluate_model.main(arguments) == 0  # finished work is not done again
    assert path.stat().st_mtime_ns == written
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == shown[-2] and "LongPPL" in shown[-1]
    assert evaluate_model.main([*arguments, "--key-checkpoint", run]) == 0
    assert "was measured with another key_" in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert again["longppl"]["longppl"] == results[0][0]["longppl"]["longppl"]
    text = write_report([run], folder / "report", None)
    assert (folder / "report" / "text_run.png").exists()
    assert "dense" in text


def test_inspect_data_looks_at_a_step_and_through_a_model(trained, capsys, monkeypatch):
    folder, _, _ = trained
    run = str(folder / "run")
    assert "document" in describe_step(run, 0)
    assert re.search(r"tokens \d+ to \d+: ", describe_step(run, 0))
    with monkeypatch.context() as patch:  # the model file was replaced by another tokenizer's
        other = SimpleNamespace(identity=SimpleNamespace(digest="other"))
        patch.setattr(step_documents_module, "load_tokenizer", lambda path: other)
        assert not re.search(r"tokens \d+ to \d+:", describe_step(run, 0))
    inspect_data.main([run, "--step", "3"])
    assert f"sequence {step_documents(run, 3)[0].sequence} of" in capsys.readouterr().out
    page = folder / "page.html"
    train = str(folder / "train")
    view = ["--document", "1", "--checkpoint", run, "--window", str(WINDOW), "--by", "difference"]
    inspect_data.main([train, *view, "--html", str(page), "--color", "always"])
    assert "\x1b[48;2;" in capsys.readouterr().out and "<span" in page.read_text()
    with pytest.raises(InputError, match="the run has 0 to 3"):
        step_documents(run, 4)
    # A run that went on with other data, before its next checkpoint.
    changed = folder / "changed"
    shutil.copytree(run, changed)
    config = yaml.safe_load((changed / "run.yaml").read_text())
    (changed / "run.yaml").write_text(yaml.safe_dump(config | {"seed": 7}))
    with pytest.raises(InputError, match=r"on other data than its run.yaml names \(seed was"):
        step_documents(changed, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 5000}, "the longest document has .* tokens, but"),
        ({"window": 64}, "window 64 >= sequence length 64"),
        ({"window": None, "stride": 4}, "--stride has no meaning without --window"),
        ({"window": None, "stride": None}, "--alpha has no meaning without --window or --key"),
        ({"window": None, "stride": None, "alpha": 2.0}, "--beta has no meaning without --window"),
        (
            {"window": None, "stride": None, "key_checkpoint": "x"},
            "window 5120 >= sequence length 64",
        ),
        ({"stride": 17}, "stride 17 > window 16"),
        ({"alpha": math.nan}, "--alpha is nan, expected a finite number of nats"),
        ({"key_checkpoint": "missing"}, "missing: no complete checkpoint found"),
    ],
)
def test_bad_settings_are_named_in_one_line(trained, changes, message):
    folder, validation, _ = trained
    with pytest.raises(InputError, match=message) as error:
        evaluate(folder / "run", validation, replace(SETTINGS, **changes))
    assert "\n" not in str(error.value)


def test_a_length_that_a_model_is_not_made_for_is_said(trained, capsys):
    folder, validation, _ = trained
    evaluate(folder / "run", validation, replace(SETTINGS, sequence_length=SEQUENCE))
    assert "made for" not in capsys.readouterr().out
    evaluate(folder / "run", validation, replace(SETTINGS, sequence_length=SEQUENCE + 8))
    said = f"72 tokens are more than {SEQUENCE}, what .*run.* is made for"
    assert re.search(said, capsys.readouterr().out)


def test_with_an_evaluator_the_windows_are_longppl_s_own_unless_given(trained):
    from lctw_megatron.evaluation.evaluate import complete

    bare = EvaluationSettings(sequence_length=8192)
    for given, windows in (
        ({}, (None, None)),
        ({"key_checkpoint": "x"}, (5120, 1024)),
        ({"key_checkpoint": "x", "stride": 512}, (5120, 512)),
        ({"key_checkpoint": "x", "window": 2048}, (2048, 512)),
    ):
        settings = complete(replace(bare, **given), *agreed_checkpoint(trained[0] / "run"))
        assert (settings.window, settings.stride) == windows


def test_a_loss_that_is_not_finite_is_no_missing_target(trained):
    folder, validation, _ = trained
    source = open_held_out(validation, SEQUENCE)
    model = ModelLosses(folder / "run", LayoutConfig(), SEQUENCE, 4096)
    assert np.isfinite(model.losses([source.read(0)])).all()
    next(model.chunks[0].parameters()).data[int(source.read(0).tokens[5])] = float("nan")
    with pytest.raises(InputError, match=r"its loss of target \d+ of a sequence .* is nan"):
        model.losses([source.read(0)])


def test_data_of_another_tokenizer_and_damaged_output_are_refused(trained, tmp_path):
    from tests.data.small_data import write_tokens

    folder, validation, _ = trained
    write_tokens(tmp_path / "other", [list(range(100))], vocab_size=150)
    with pytest.raises(InputError, match="but the tokenizer of"):
        evaluate(folder / "run", str(tmp_path / "other"), SETTINGS)
    (tmp_path / "out.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        evaluate_to_file(folder / "run", validation, tmp_path / "out.json", SETTINGS)
    assert (tmp_path / "out.json").read_text() == "{"
    with pytest.raises(InputError, match="no complete checkpoint"):
        evaluate(tmp_path, validation, SETTINGS)


def test_held_out_sequences_are_full(trained):
    _, validation, _ = trained
    source = open_held_out(validation, SEQUENCE)
    assert (source.index.piece_length == SEQUENCE).all()
