"""Models with experts: what config.json says of them, and both forms of their tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion import checkpoint_reader
from lctw_megatron.conversion.hf_config import config_values, read_config
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.verify import compare_tensors
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import (
    EXPERT_FIELDS,
    all_tensors,
    assert_same_tensors,
    make_model,
)


def write(folder: Path, kind: str, **changes: Any) -> None:
    """The least that a config.json must say."""
    values = dict(
        model_type=kind, vocab_size=161, hidden_size=64, intermediate_size=100,
        num_hidden_layers=2, num_attention_heads=32,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("kind", sorted(EXPERT_FIELDS))
def test_what_config_json_leaves_out_of_experts_means_what_transformers_means(kind, tmp_path):
    from transformers import AutoConfig

    write(tmp_path, kind)
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read_config(tmp_path).model
    assert ours.num_moe_experts == theirs.num_local_experts
    assert ours.moe_router_topk == theirs.num_experts_per_tok
    assert ours.moe_aux_loss_coeff == theirs.router_aux_loss_coef
    assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    width = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.moe_ffn_hidden_size == width


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_sparse_step", 2), ("mlp_only_layers", [0]),
        ("num_experts", 1), ("num_experts", 0), ("num_experts", "8"), ("num_experts", None),
        ("moe_intermediate_size", None),
        ("num_experts_per_tok", 0), ("num_experts_per_tok", 129), ("moe_intermediate_size", -4),
        ("router_aux_loss_coef", -1.0), ("norm_topk_prob", 3),
    ],
)  # fmt: skip
def test_what_layers_with_experts_cannot_be_is_refused_by_its_name(field, value, tmp_path):
    write(tmp_path, "qwen3_moe", **{field: value})
    with pytest.raises(InputError, match=f"config.json: (unsupported: )?{field} "):
        read_config(tmp_path)


def test_mixtral_with_noise_before_its_router_and_other_families_are_refused(tmp_path):
    for kind, changes, line in [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 "),
        ("mixtral", {"sliding_window": 4096}, "sliding_window 4096 "),
        ("qwen2_moe", {}, "model_type 'qwen2_moe' cannot be converted"),
    ]:
        write(tmp_path, kind, **changes)
        with pytest.raises(InputError, match=f"config.json: (unsupported: )?{line}"):
            read_config(tmp_path)


def test_the_number_of_experts_is_read_under_both_names_of_transformers(tmp_path):
    for name in ("num_experts", "num_local_experts"):
        write(tmp_path, "qwen3_moe", **{name: 12})
        config = read_config(tmp_path)
        assert config.model.num_moe_experts == 12 and not config.ignored


def test_a_model_whose_experts_its_architecture_lacks_is_not_written():
    model = ModelConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=10,
        max_position_embeddings=8,
    )  # fmt: skip
    for changes, line in [
        ({"num_moe_experts": 4}, "num_moe_experts is 4.* llama has none; use architecture mixtral"),
        ({"architecture": "mixtral"}, "is None.* mixtral has experts; use architecture llama"),
        (
            {"architecture": "mixtral", "num_moe_experts": 4, "moe_ffn_hidden_size": 6},
            "moe_ffn_hidden_size is 6.* make them equal",
        ),
    ]:
        with pytest.raises(InputError, match=line):
            config_values(model.model_copy(update=changes), "fp32", {})


def newest_transformers() -> bool:
    from transformers import __version__

    return int(__version__.split(".")[0]) >= 5


@pytest.mark.skipif(not newest_transformers(), reason="fused experts came with transformers 5")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_the_same_model_as_single_ones(name: str, tmp_path: Path) -> None:
    single, fused = (tmp_path / kind for kind in ("single", "fused"))
    make_model(name, single)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(single)
    model.save_pretrained(fused, save_original_format=False)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in all_tensors(fused))
    import_hf(fused, tmp_path / "checkpoint", log=lambda line: None)
    export_hf(tmp_path / "checkpoint", tmp_path / "back", log=lambda line: None)
    assert_same_tensors(single, tmp_path / "back")
    assert not any(result.different for result in compare_tensors(fused, tmp_path / "checkpoint"))


def test_what_is_missing_of_experts_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    make_model("qwen3_moe", tmp_path)
    tensors = all_tensors(tmp_path)
    lost = "model.layers.1.mlp.experts.4.up_proj.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{lost} is missing"):
        import_hf(tmp_path, tmp_path / "checkpoint", log=lambda line: None)


def test_an_expert_is_read_without_looking_at_those_of_all_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch looks at boxes one by one: for each of Qwen3-30B-A3B's 12,288 at 6,144."""
    looked_at = []

    def counted(key: str, entry: Any, wanted: Any) -> Any:
        looked_at.append(len(entry.chunks))
        return create_read_items_for_chunk_list(key, entry, wanted)

    monkeypatch.setattr(checkpoint_reader, "create_read_items_for_chunk_list", counted)
    make_model("qwen3_moe", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "checkpoint", log=lambda line: None)
    export_hf(tmp_path / "checkpoint", tmp_path / "back", log=lambda line: None)
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    assert set(looked_at) == {1} and len(looked_at) > 48
