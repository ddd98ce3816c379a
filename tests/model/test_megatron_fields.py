"""What a recipe may set of megatron-core's own configs, and what it is told of the rest."""

import re
from dataclasses import fields
from typing import Any

import pytest

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.errors import InputError
from lctw_megatron.model import megatron_fields
from lctw_megatron.model.megatron_fields import FREE, check_megatron_fields
from tests.training.layouts import make_run


def run_with(**megatron: Any) -> RunConfig:
    return make_run("tokens", "folder", {}, "chunk", "uniform", "frozen", megatron=megatron)


def refusal(**megatron: Any) -> str:
    with pytest.raises(InputError) as error:
        check_megatron_fields(run_with(**megatron))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_free_fields_pass_and_stay_in_the_saved_run() -> None:
    run = run_with(
        ddp={"overlap_param_gather": True, "bucket_size": 1000},
        transformer={"deallocate_pipeline_outputs": True, "cp_comm_type": "a2a"},
        optimizer={"decoupled_weight_decay": False},
    )
    check_megatron_fields(run)
    saved = RunConfig.model_validate(run.model_dump(mode="json"))
    assert saved.megatron == run.megatron and saved.megatron.ddp["bucket_size"] == 1000


def test_an_output_is_not_freed_while_it_is_sent() -> None:
    run = run_with(transformer={"deallocate_pipeline_outputs": True})
    layout = run.layout.model_copy(update={"pipeline": 2, "virtual_pipeline": 2})
    with pytest.raises(InputError, match="cannot be set with layout.virtual_pipeline"):
        check_megatron_fields(run.model_copy(update={"layout": layout}))


def test_a_megatron_core_without_hybridmodel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_fields, "MEGATRON", (0, 17))
    check_megatron_fields(run_with(model="gpt"))
    assert "megatron.model is hybrid, but megatron-core" in refusal(model="hybrid")
    monkeypatch.setattr(megatron_fields, "MEGATRON", (0, 18))
    check_megatron_fields(run_with(model="hybrid"))


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("ddp", "overlap_param_gahter", True, "did you mean overlap_param_gather?"),
        ("transformer", "grad_accumulation_fusion", True, "mean gradient_accumulation_fusion?"),
        ("ddp", "overlap_param_gather", "yes", "is 'yes', expected a boolean"),
        ("ddp", "overlap_grad_reduce", 1, "is 1, expected a boolean"),
        ("ddp", "bucket_size", 0, "is 0, expected greater than 0"),
        ("ddp", "bucket_size", 1.5, "is 1.5, expected a integer"),
        ("transformer", "cp_comm_type", "ring", "expected 'p2p', 'all_gather' or 'a2a'"),
        ("transformer", "num_layers", 2, "use model.num_layers"),
        ("transformer", "add_qkv_bias", True, "use model.qkv_bias"),
        ("transformer", "recompute_granularity", "full", "use layout.recompute"),
        ("transformer", "tensor_model_parallel_size", 2, "use layout.tensor"),
        ("optimizer", "adam_beta2", 0.9, "use training.adam_beta2"),
        ("optimizer", "params_dtype", "bf16", "use training.precision"),
        ("optimizer", "overlap_param_gather", True, "use megatron.ddp.overlap_param_gather"),
        ("transformer", "calculate_per_token_loss", False, "divided once by the targets"),
        ("transformer", "batch_p2p_comm", True, "swapped tensors"),
        ("transformer", "microbatch_group_size_per_vp_stage", 4, "multiples of layout.pipeline"),
        ("transformer", "fp8", "hybrid", "has not been measured"),
        ("transformer", "moe_router_topk", 1, "use model.moe_router_topk"),
        ("transformer", "moe_expert_capacity_factor", 1.0, "are model/router.py's"),
        ("transformer", "expert_model_parallel_size", 2, "use layout.expert"),
        ("transformer", "cuda_graph_impl", "local", "free are gradient_accumulation_fusion"),
        ("ddp", "average_in_collective", True, "summed in float32"),
        ("ddp", "use_megatron_fsdp", True, "one distributed optimizer"),
        ("optimizer", "optimizer", "sgd", "made for AdamW"),
        ("optimizer", "decoupled_lr", 1.0, "one rate"),
    ],
)
def test_a_refusal_names_the_field_and_what_would_be_right(
    section: str, name: str, value: Any, message: str
) -> None:
    found = refusal(**{section: {name: value}})
    assert found.startswith(f"run layout: megatron.{section}.{name}") and message in found


def test_every_field_that_the_tables_name_is_one_of_megatron_core() -> None:
    for section, config in megatron_fields._configs().items():
        known = {field.name for field in fields(config)}
        assert set(FREE[section]) <= known
        tables = megatron_fields._OF_THE_RECIPE[section], megatron_fields._BREAKS[section]
        for pattern in (pattern for table in tables for pattern in table.values()):
            found = {name for name in known if re.fullmatch(pattern, name)}
            assert found, pattern
            assert not found & set(FREE[section]), pattern
