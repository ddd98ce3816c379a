"""An export for Megatron-LM; tests/plugin/test_pretrain.py loads one with its own --load."""

import json
from argparse import Namespace

import pytest
import torch

from lctw_megatron.commands.convert import main
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.conversion import megatron_lm
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import load_weights, read_manifest, write_manifest
from lctw_megatron.model.gpt import build_model
from lctw_megatron.platform.world import initialize
from tests.conversion.hf_models import MAX_POSITIONS, make_model


@pytest.fixture
def checkpoint(tmp_path, request):
    """Imported; at step 0."""
    hf = make_model(request.param, tmp_path / "hf")
    import_hf(hf, tmp_path / "checkpoint", log=lambda line: None)
    return tmp_path / "checkpoint"


def fresh_model(model):
    world = initialize(LayoutConfig(), seed=0)
    (chunk,) = build_model(
        model, LayoutConfig(), max_sequence_length=MAX_POSITIONS, dtype=torch.float32,
        device=world.device, seed=1,
    )  # fmt: skip
    return chunk


@pytest.mark.parametrize("checkpoint", ["llama", "qwen3_tied"], indirect=True)
def test_plain_megatron_core_loads_an_export_and_finds_what_megatron_lm_asks(
    checkpoint, tmp_path, capsys
):
    from megatron.core import dist_checkpointing

    output = tmp_path / "exported"
    command = ["export", "--checkpoint", str(checkpoint), "--output", str(output)]
    assert main([*command, "--format", "megatron-lm"]) == 0
    assert f"--load {output} --use-checkpoint-args" in capsys.readouterr().out
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "release"
    model = read_manifest(checkpoint).model
    expected, found = fresh_model(model), fresh_model(model)
    load_weights([expected], checkpoint)
    loaded = dist_checkpointing.load({"model": found.sharded_state_dict()}, str(output / "release"))
    found.load_state_dict(loaded["model"])
    for (name, one), (_, other) in zip(
        expected.named_parameters(), found.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    common = dist_checkpointing.load_common_state_dict(str(output / "release"))
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)
    arguments = common["args"]
    assert isinstance(arguments, Namespace)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name, theirs in {
        "num_layers": "num_hidden_layers", "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size", "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim",
        "max_position_embeddings": "max_position_embeddings", "vocab_size": "vocab_size",
    }.items():  # fmt: skip
        assert getattr(arguments, name) == config[theirs], name
    assert arguments.untie_embeddings_and_output_weights != config["tie_word_embeddings"]
    assert arguments.padded_vocab_size == 256
    assert main([*command, "--format", "megatron-lm"]) == 0
    assert "is finished, nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("checkpoint", ["llama_yarn"], indirect=True)
def test_what_a_checkpoint_cannot_tell_megatron_lm_is_said_or_refused(
    checkpoint, tmp_path, monkeypatch
):
    lines = []
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, manifest.model_copy(update={"step": 70}))
    megatron_lm.export_megatron_lm(checkpoint, tmp_path / "exported", log=lines.append)
    assert (tmp_path / "exported" / "iter_0000070" / "common.pt").is_file()
    assert "takes the scaling from no checkpoint" in lines[-1] and "yarn" in lines[-1]
    monkeypatch.setattr(megatron_lm, "_SAID_BY_ARGUMENTS", ("qwen2",))
    with pytest.raises(InputError, match="architecture llama cannot be exported to Megatron-LM"):
        megatron_lm.export_megatron_lm(checkpoint, tmp_path / "another")
    assert not (tmp_path / "another").exists()
