"""Hugging Face to checkpoint and back: every bit, every logit, whatever the sizes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.verify import hf_logits, megatron_logits
from lctw_megatron.model.checkpoint import read_manifest
from tests.conversion.hf_models import (
    MAX_POSITIONS,
    MODELS,
    VOCABULARY,
    all_tensors,
    assert_same_tensors,
    make_model,
    random_tokens,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_llama"
LOGITS = 1e-5
"""Largest difference of float32 logits between transformers and us; the logits are about 3 wide."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """name -> (Hugging Face folder, checkpoint, exported folder), made when first asked for."""
    root = tmp_path_factory.mktemp("round_trip")

    def get(name: str) -> tuple[Path, Path, Path]:
        hf, checkpoint, back = (root / f"{name}_{kind}" for kind in ("hf", "checkpoint", "back"))
        if not back.exists():
            make_model(name, hf, shard_size="100KB" if name == "llama" else "5GB")
            import_hf(hf, checkpoint)
            export_hf(checkpoint, back, max_file_bytes=100_000)
        return hf, checkpoint, back

    return get


def rope_of(folder: Path) -> dict[str, Any]:
    """All that config.json says of positions, in whichever transformers' form."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {"rope_type": "default"}
    names = ("max_position_embeddings", "rope_theta", "partial_rotary_factor")
    return {name: config[name] for name in names if name in config} | rope


@pytest.mark.parametrize("name", sorted(MODELS))
def test_import_and_export_give_back_every_bit(name, converted):
    hf, _, back = converted(name)
    assert_same_tensors(hf, back)
    assert rope_of(hf) == rope_of(back)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert (back / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_are_those_of_transformers_beyond_the_original_maximum(name, converted):
    hf, checkpoint, back = converted(name)
    for length in (MAX_POSITIONS // 3, MAX_POSITIONS + 1, 5 * MAX_POSITIONS):
        tokens = random_tokens(length, rows=2)
        theirs, ours = hf_logits(hf, tokens), megatron_logits(checkpoint, tokens)
        assert ours.shape == (2, length, VOCABULARY)
        assert 0.5 < theirs.std() < 10  # a test of zeros would prove nothing
        assert (ours - theirs).abs().max() < LOGITS
    assert torch.equal(hf_logits(back, tokens), theirs)


def test_padding_rows_of_the_vocabulary_are_zero(converted):
    from lctw_megatron.conversion.checkpoint_reader import open_checked
    from lctw_megatron.conversion.placement import stored_tensors

    _, checkpoint, _ = converted("llama")
    reader = open_checked(checkpoint)
    for stored in stored_tensors(read_manifest(checkpoint).model):
        value = reader.read(stored, np.empty(4 * math.prod(stored.shape), np.uint8))
        if stored.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert value.shape == (256, 48)
            assert (value[VOCABULARY:] == 0).all() and (value[:VOCABULARY] != 0).all()


def test_dtypes_are_converted_on_the_way_in_and_out(tmp_path):
    hf = make_model("qwen3", tmp_path / "hf", torch.bfloat16)
    source = all_tensors(hf)
    import_hf(hf, tmp_path / "kept")
    assert read_manifest(tmp_path / "kept").dtype == "bf16"
    import_hf(hf, tmp_path / "wide", "fp32")
    assert read_manifest(tmp_path / "wide").dtype == "fp32"
    export_hf(tmp_path / "wide", tmp_path / "wide_hf")
    export_hf(tmp_path / "wide", tmp_path / "narrow_hf", "bf16")
    export_hf(tmp_path / "kept", tmp_path / "half_hf", "fp16")
    assert_same_tensors(hf, tmp_path / "narrow_hf")
    for name, tensor in all_tensors(tmp_path / "wide_hf").items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, source[name].float())
    for name, tensor in all_tensors(tmp_path / "half_hf").items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, source[name].half())
    config = json.loads((tmp_path / "half_hf" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"


def test_several_files_so_that_ranks_read_in_parallel(tmp_path, monkeypatch, converted):
    from lctw_megatron.conversion import checkpoint_writer

    hf, checkpoint, _ = converted("llama")
    monkeypatch.setattr(checkpoint_writer, "FILE_BYTES", 100_000)
    import_hf(hf, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.distcp"))) > 2
    tokens = random_tokens(20)
    assert torch.equal(
        megatron_logits(tmp_path / "many", tokens), megatron_logits(checkpoint, tokens)
    )


def test_nothing_is_asked_for_that_is_not_there_and_only_empty_states_are_left(converted):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.model.checkpoint import model_state
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize, shut_down

    world = initialize(LayoutConfig(), seed=1)
    try:
        for name in ("llama31_tied", "qwen2", "qwen3", "qwen3_moe"):
            _, checkpoint, _ = converted(name)
            chunks = build_model(
                read_manifest(checkpoint).model, LayoutConfig(), max_sequence_length=8,
                dtype=torch.float32, device=world.device, seed=None,
            )  # fmt: skip
            state = model_state(chunks)
            keys = {leaf.key for leaf in state["model"].values()}
            _, *mismatches = dist_checkpointing.load(
                state, str(checkpoint), strict=StrictHandling.RETURN_ALL
            )
            for key in set().union(*mismatches):
                assert key.endswith("._extra_state") and key not in keys, key
    finally:
        shut_down()


def test_golden_logits_and_losses_through_import(tmp_path):
    import_hf(GOLDEN / "model", tmp_path / "checkpoint")
    scores = np.load(GOLDEN / "scores.npz")
    tokens = torch.from_numpy(scores["tokens"]).long()
    logits = megatron_logits(tmp_path / "checkpoint", tokens)
    expected = torch.from_numpy(scores["logits_first_64"])
    torch.testing.assert_close(logits[:, :64], expected, rtol=0, atol=1e-4)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    torch.testing.assert_close(losses, torch.from_numpy(scores["long_loss"]), rtol=0, atol=1e-4)
    manifest = read_manifest(tmp_path / "checkpoint")
    assert manifest.step == 0 and not manifest.optimizer and manifest.tokenizer is None


def test_special_tokens_survive_without_a_tokenizer(converted):
    hf, _, back = converted("mistral")
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (hf, back))
        assert after["eos_token_id"] == before["eos_token_id"] == [4, 5]
        assert after["bos_token_id"] == before["bos_token_id"] == 3


def test_the_tokenizer_goes_along(tmp_path, hf_folder, converted):
    from lctw_megatron.data.tokenizers import load_tokenizer

    hf = shutil.copytree(converted("qwen3")[0], tmp_path / "hf")
    for path in Path(hf_folder).iterdir():
        shutil.copyfile(path, hf / path.name)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    identity = load_tokenizer(hf).identity
    assert read_manifest(tmp_path / "checkpoint").tokenizer == identity.model_dump()
    assert load_tokenizer(tmp_path / "checkpoint" / "tokenizer").identity.digest == identity.digest
    assert load_tokenizer(tmp_path / "back").identity.digest == identity.digest
    settings = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [4, 5]
