"""The two examples of the plug-in, in the real loops they are for, equal tools/train.py; what is
exported is loaded there, and what is saved there is imported."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("megatron.training") is None:
    pytest.skip(
        "megatron.training is not installed; megatron-core's wheels for Python 3.12 have it: "
        "make test-next",
        allow_module_level=True,
    )

from megatron.core.datasets.gpt_dataset import GPTDataset

from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.conversion.hf_config import config_values
from lctw_megatron.conversion.megatron_lm import export_megatron_lm, loading_arguments
from lctw_megatron.conversion.megatron_lm_import import import_megatron_lm
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.model.checkpoint import find_checkpoint, load_weights, read_manifest
from lctw_megatron.model.gpt import build_model
from lctw_megatron.platform.world import initialize
from lctw_megatron.plugin.dataset import ShortLossGPTDataset
from tests.data.small_data import write_sidecar
from tests.distributed import run_distributed
from tests.plugin.pretrain_runs import (
    SEED,
    SEQUENCE,
    SPLIT,
    STEPS,
    VOCABULARY,
    by_megatron_bridge,
    by_megatron_lm,
    token_losses,
)  # fmt: skip
from tests.plugin.scene import build
from tests.training.layouts import make_run

WINDOW = 16
TOKENIZER = TokenizerIdentity(
    kind="sentencepiece", path="none", digest="0", vocab_size=VOCABULARY, bos_id=None, eos_id=None,
    add_bos=False, add_eos=False,
)  # fmt: skip
MODEL = {"num_layers": 2, "vocab_size": VOCABULARY, "qkv_bias": False, "qk_norm": False}


def write(prefix, documents, losses, **details):
    with TokenWriter(str(prefix), TOKENIZER) as writer:
        for document in documents:
            writer.add(document.astype(np.uint16))
    write_sidecar(TokenDataset(str(prefix)), losses, window=WINDOW, stride=12, **details)
    return str(prefix)


def corpus(prefix):
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, VOCABULARY - 1, n) for n in rng.integers(20, 300, 30)]
    losses = [rng.gamma(2.0, 2.0, len(document)) for document in documents]
    for values in losses:
        values[:WINDOW] = np.nan
    return write(prefix, documents, losses)


def as_documents(source, prefix, folder):
    """The samples that Megatron's loop reads, in its order, as documents for tools/train.py.

    That each label has its own short loss is shown by test_dataset.py.
    """
    options = {"split": SPLIT, "random_seed": SEED, "sequence_length": SEQUENCE}
    samples = 8 * STEPS
    weighted, _, _ = build(ShortLossGPTDataset, [source], folder, samples, **options)
    plain, _, _ = build(GPTDataset, [source], folder, samples, **options)
    texts = [np.append(plain[n]["tokens"], plain[n]["labels"][-1:]) for n in range(samples)]
    losses = [np.append([np.nan], weighted[n]["loss_mask"].numpy()) for n in range(samples)]
    # What the first window of a sample says nothing about is already left out.
    return write(prefix, texts, losses, score_first_window=True)


def ten_steps_of_ours(prefix, folder):
    """Weights before, metrics of each step, weights after, by the real trainer."""
    from lctw_megatron.training.loop import Trainer

    data = {"train": [{"prefix": prefix}], "sequence_length": SEQUENCE, "shuffle": False}
    run = make_run(
        prefix, str(folder), {}, "chunk", "uniform", "frozen", model=MODEL, data=data,
        weighting=load_fragment("weighting", "dense", "test"),
        training={"steps": STEPS, "weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 1.0},
    )  # fmt: skip
    trainer = Trainer(run)

    def weights():
        return {name: p.detach().numpy().copy() for name, p in trainer.chunks[0].named_parameters()}

    try:
        before = weights()
        steps = range(STEPS)
        metrics = [trainer.stepper.step(n, list(trainer.loader.step(n))) for n in steps]
        trainer.save(STEPS)
        trainer.writer.finish()
        return before, metrics, weights()
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The corpus, and what ``ten_steps_of_ours`` gives for Megatron's samples of it."""
    folder = tmp_path_factory.mktemp("ours")
    initialize(LayoutConfig(), seed=0)  # Megatron's dataset builder asks the group
    source = corpus(folder / "corpus")
    return source, *ten_steps_of_ours(as_documents(source, folder / "ours", folder), folder / "run")


@pytest.fixture(scope="module")
def megatron_lm(ours):
    """Where Megatron-LM has saved what it made of our first weights, and both ranks' outcomes."""
    source, before, *_ = ours
    folder = Path(source).parent / "megatron_lm"
    saving = ["--save", str(folder / "saved"), "--save-interval", str(STEPS)]
    return folder / "saved", run_distributed(
        by_megatron_lm, 2, source, str(folder), before, *saving, timeout=500
    )


def check(outcome, ours):
    losses, weights = outcome
    _, before, metrics, after = ours
    assert len(losses) == STEPS
    for step, (found, expected) in enumerate(zip(losses, metrics, strict=True)):
        assert found["lm loss"] == pytest.approx(expected["loss/weighted"], rel=1e-6), step
        assert found["unweighted lm loss"] == pytest.approx(expected["loss/plain"], rel=1e-6)
        share = expected["targets/unscored"] / expected["targets/all"]
        assert found["unscored"] == pytest.approx(share, rel=1e-6)
    assert weights.keys() == after.keys()
    for name, expected in after.items():
        # Adam makes steps of rounding errors where a gradient is next to nothing.
        moved = np.linalg.norm(expected - before[name])
        assert np.linalg.norm(weights[name] - expected) < 1e-3 * moved, name
    assert metrics[-1]["loss/weighted"] < metrics[0]["loss/weighted"]
    assert abs(metrics[0]["loss/weighted"] - metrics[0]["loss/plain"]) > 1e-3, "weights matter"


def test_ten_steps_of_megatron_lm_on_two_data_parallel_ranks_equal_our_trainer_s(ours, megatron_lm):
    for outcome, _ in megatron_lm[1]:
        check(outcome, ours)


def test_what_megatron_lm_has_saved_comes_in_bit_for_bit_and_loses_the_same(
    ours, megatron_lm, tmp_path
):
    saved, [((_, weights), expected), _] = megatron_lm
    model = read_manifest(find_checkpoint(Path(ours[0]).parent / "run")).model
    (tmp_path / "config.json").write_text(json.dumps(config_values(model, "fp32", {})))
    import_megatron_lm(saved, tmp_path, tmp_path / "imported")
    world = initialize(LayoutConfig(), seed=0)
    (chunk,) = build_model(
        model, LayoutConfig(), max_sequence_length=SEQUENCE, dtype=torch.float32,
        device=world.device, seed=None,
    )  # fmt: skip
    load_weights([chunk], tmp_path / "imported")
    for name, value in chunk.named_parameters():
        np.testing.assert_array_equal(value.detach().numpy(), weights[name], err_msg=name)
    np.testing.assert_allclose(token_losses(chunk), expected, rtol=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None,
    reason="megatron-bridge is not installed; a new environment of make test-next has it",
)
def test_ten_steps_of_megatron_bridge_equal_our_trainer_s(ours, tmp_path):
    source, before, *_ = ours
    (outcome,) = run_distributed(by_megatron_bridge, 1, source, str(tmp_path), before, timeout=500)
    check(outcome, ours)


def test_megatron_lm_loads_an_export_bit_for_bit(ours, tmp_path):
    source, _, _, after = ours
    run = Path(source).parent / "run"
    export_megatron_lm(run, tmp_path / "exported")
    model = read_manifest(find_checkpoint(run)).model
    arguments = [*loading_arguments(model, tmp_path / "exported"), "--skip-train"]
    (((losses, loaded), _),) = run_distributed(
        by_megatron_lm, 1, source, str(tmp_path), {}, *arguments, timeout=500
    )
    assert not losses and loaded.keys() == after.keys()
    for name, expected in after.items():
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)
