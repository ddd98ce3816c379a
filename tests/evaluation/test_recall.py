"""Recall of a tiny model under several layouts, against transformers, and from the command."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lctw_megatron.commands import evaluate_model
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.data.batch import IGNORE
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.evaluation.model_losses import ModelLosses
from lctw_megatron.evaluation.recall_result import read_recall, select, sums
from lctw_megatron.evaluation.recall_samples import RecallSample, SampleMaker
from lctw_megatron.evaluation.recall_tasks import TASKS
from tests.conversion.hf_models import make_model
from tests.distributed import run_distributed
from tests.tokenizer_files import VOCAB_SIZE
from tests.tools.command import call

LENGTH, WINDOW = 512, 256
LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "CP2": {"context": 2},
    "PP2": {"pipeline": 2},
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory, hf_folder) -> Path:
    """A checkpoint whose head gives chances to digits and to a space only, so that a random model
    is right now and then."""
    root = tmp_path_factory.mktemp("recall")
    model = make_model("llama", root / "hf", vocab_size=VOCAB_SIZE)
    for path in Path(hf_folder).iterdir():
        shutil.copyfile(path, model / path.name)
    tensors = load_file(model / "model.safetensors")
    chosen = np.unique(
        np.concatenate(load_tokenizer(hf_folder).encode_batch([*"0123456789", " 1"]))
    )
    others = np.setdiff1d(np.arange(VOCAB_SIZE), chosen)
    tensors["lm_head.weight"][torch.from_numpy(others)] *= 0.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    import_hf(model, root / "checkpoint")
    return root / "checkpoint"


def make_samples(checkpoint: str | Path) -> list[RecallSample]:
    tokenizer = load_tokenizer(Path(checkpoint) / "tokenizer")
    maker = SampleMaker(tokenizer, None, 0, VOCAB_SIZE)
    tasks = [task for task in TASKS if task != "multi_key"]  # too long for this tokenizer
    return [maker(task, LENGTH, 0.5, number) for task in tasks for number in range(2)]


def measured(checkpoint: str, layouts: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """On every rank: losses and whether likeliest under each layout, [2, samples, LENGTH]."""
    samples = [sample.whole() for sample in make_samples(checkpoint)]
    found = {}
    for name, sizes in layouts.items():
        model = ModelLosses(checkpoint, LayoutConfig.model_validate(sizes), LENGTH, 3 * LENGTH)
        found[name] = model.losses_and_likeliest(samples)
        model.free()
    return found


def test_every_layout_gives_what_one_process_gives_and_transformers_too(imported, tmp_path):
    from transformers import AutoModelForCausalLM

    alone = measured(str(imported), {"alone": {}})["alone"]
    live = ~np.isnan(alone[0])
    assert live.sum() > 100 and 0.02 < alone[1][live].mean() < 0.5
    for rank in run_distributed(measured, 2, str(imported), LAYOUTS):
        for name, found in rank.items():
            assert np.abs(found[0] - alone[0])[live].max() < 1e-5, name
            assert (found[1][live] == alone[1][live]).all(), name
            assert np.isnan(found[:, ~live]).all(), name

    export_hf(imported, tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    for row, sample in enumerate(make_samples(imported)):
        tokens = torch.from_numpy(sample.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = theirs(tokens[:, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        targets = sample.whole().labels != IGNORE
        assert np.abs(losses.numpy()[targets] - alone[0, row][targets]).max() < 1e-4
        likeliest = (logits.argmax(-1) == tokens[0, 1:]).numpy()
        assert (likeliest[targets] == (alone[1, row][targets] == 1)).all()


@pytest.fixture(scope="module")
def arguments(imported) -> list[Any]:
    tasks = ["--tasks", "one_key", "frequent_words", "multi_value"]
    sizes = ["--lengths", WINDOW, LENGTH, "--window", WINDOW, "--samples", 3, "--depths", 2]
    return ["recall", "--checkpoint", imported, *tasks, *sizes]


def test_the_command_writes_what_each_sample_gave_and_says_it(
    arguments, imported, tmp_path, capsys
):
    output, samples = tmp_path / "recall.json", tmp_path / "samples.jsonl"
    files = ["--output", output, "--write-samples", samples]
    answer = call(evaluate_model.main, capsys, *arguments, *files)
    assert answer.status == 0, answer.err
    assert f"lengths {WINDOW}, {LENGTH} are beyond the model's max_position" in answer.out
    result = read_recall(output)
    assert result is not None
    assert [(c["task"], c["length"], c["depth"]) for c in result["cells"]] == [
        (task, length, depth)
        for length in (WINDOW, LENGTH)
        for task in ("one_key", "frequent_words", "multi_value")
        for depth in ([None] if task == "frequent_words" else [0.0, 1.0])
    ]
    (cell,) = select(result, "multi_value", LENGTH, 1.0)
    model = ModelLosses(imported, LayoutConfig(), LENGTH)
    maker = SampleMaker(load_tokenizer(imported / "tokenizer"), None, 0, VOCAB_SIZE)
    for number in range(3):
        sample = maker("multi_value", LENGTH, 1.0, number)
        for kind, part in (("", sample.whole()), ("short_", sample.short(WINDOW, maker.bos_id))):
            loss, likeliest = model.losses_and_likeliest([part])[:, 0]
            assert cell[f"{kind}nats"][number] == pytest.approx(np.nansum(loss), rel=1e-5)
            right = [likeliest[places - len(sample.ids)].all() for places in sample.answers]
            assert cell[f"{kind}right"][number] == pytest.approx(np.mean(right))
        assert cell["tokens"][number] == (~np.isnan(loss)).sum()
    # By hand: the mean over answer tokens, and its error from sample to sample.
    nats, tokens = np.array(cell["nats"]), np.array(cell["tokens"])
    mean = nats.sum() / tokens.sum()
    error = np.sqrt(3 / 2 * ((nats - mean * tokens) ** 2).sum()) / tokens.sum()
    assert cell["mean"]["nats"] == pytest.approx([mean, error])
    # Where the sample is not longer than the window there is no short context.
    assert all(c["short_nats"] is None for c in select(result, "one_key", WINDOW))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == len(result["cells"]) * 3
    assert all(line["text"].endswith(line["answers"][-1]) for line in lines)
    table = re.search(r"^multi_value +512 +(.*)$", answer.out, re.MULTILINE)
    both = sums(select(result, "multi_value", LENGTH), "nats")
    assert table and f"{both.mean().mean:.3f}" in table.group(1)

    written = output.stat().st_mtime_ns
    again = [
        str(each) if each is not imported else f"{imported}/../{imported.name}"
        for each in arguments
    ]
    assert call(evaluate_model.main, capsys, *again, *files).status == 0
    assert output.stat().st_mtime_ns == written  # finished work is not done again
    samples.write_text('{"task": "write"}\n')
    line = call(evaluate_model.main, capsys, *arguments, *files).error_line()
    assert line.startswith(f"--write-samples {samples}: is there and no earlier list of samples, ")
    assert samples.read_text() == '{"task": "write"}\n'
    answer = call(evaluate_model.main, capsys, *arguments, *files[:2], "--seed", 1)
    assert answer.status == 0
    assert f"{output}: was measured with another seed, is replaced" in answer.out
    other = read_recall(output)
    assert other is not None
    digests = [{cell["samples_digest"] for cell in found["cells"]} for found in (other, result)]
    assert digests[0].isdisjoint(digests[1])


def test_bad_inputs_are_one_line(arguments, imported, tmp_path, capsys):
    def refused(message: str, *changes: Any) -> None:
        answer = call(evaluate_model.main, capsys, *arguments, *changes)
        error = answer.err.splitlines()[-1]
        assert answer.status == 2 and error.startswith("error: "), answer.err
        assert re.search(message, error), error

    refused("a length of 20 tokens: a sample of task one_key needs", "--lengths", 20)
    refused("511 of --lengths .511. must be divisible by 2 x layout.context", "--lengths", 511,
            "--context", 2)  # fmt: skip
    refused("--seed -1: a seed is not negative", "--seed", -1)
    refused("--window 10: the question and answers of task one_key alone take", "--window", 10)
    refused("nowhere: neither a text file nor a token dataset", "--haystack", tmp_path / "nowhere")
    (tmp_path / "wrong.json").write_text("{}")
    refused(
        "wrong.json: not a file of the format .*; remove it and measure recall again, or name",
        "--output",
        tmp_path / "wrong.json",
    )
    refused("no complete checkpoint found", "--checkpoint", tmp_path)
    text, link = tmp_path / "text.txt", tmp_path / "link.txt"
    text.write_text("A text of mine. " * 400)
    link.symlink_to(text)
    for others in (["--haystack", text], ["--output", text]):
        refused("--write-samples .*link.txt: is read from, and", "--write-samples", link, *others)
    assert text.read_text() == "A text of mine. " * 400
    bare = shutil.copytree(imported, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    manifest = json.loads((bare / "checkpoint.json").read_text())
    (bare / "checkpoint.json").write_text(json.dumps({**manifest, "tokenizer": None}))
    refused("bare: has no tokenizer", "--checkpoint", bare)


def test_of_equal_logits_the_lowest_id_is_the_likeliest_and_padding_never():
    from lctw_megatron.model.cross_entropy import row_block_is_likeliest

    hidden = torch.tensor([[1.0], [1.0], [-1.0], [1.0]])
    weight = torch.tensor([[0.5], [2.0], [-3.0], [2.0]])
    labels = torch.tensor([1, 3, 2, IGNORE])
    assert row_block_is_likeliest(hidden, weight, labels, block_rows=1).tolist() == [1, 0, 1, 0]
    assert row_block_is_likeliest(hidden, weight[:0], labels).tolist() == [0] * 4
