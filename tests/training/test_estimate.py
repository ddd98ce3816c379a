"""The memory estimate: counted by hand, against a real model, and for every shipped GPU layout."""

import itertools
from typing import Any

import pytest

from lctw_megatron.config.layout_rules import check_layout
from lctw_megatron.config.load import CONFIGS, load_fragment
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.training.estimate import (
    GIB,
    chunks_in_flight,
    describe_layout,
    estimate,
    expert_parameters,
    layer_activations,
    stage_parameters,
)
from lctw_megatron.training.save_estimate import describe_save, estimate_save
from tests.distributed import run_distributed


def run_config(
    model: str | dict[str, Any],
    layout: str | dict[str, Any],
    sequence_length: int,
    precision: str = "bf16",
    batch: int = 64,
) -> RunConfig:
    sections = {"model": model, "layout": layout}
    for name, value in sections.items():
        if isinstance(value, str):
            sections[name] = load_fragment(name, value, "the test")
    return RunConfig.model_validate(
        {
            "name": "main",
            "run_dir": "out/main",
            "data": {"train": "corpus", "sequence_length": sequence_length},
            "training": {
                "steps": 1,
                "global_batch_size": batch,
                "micro_batch_size": 1,
                "precision": precision,
            },
            **sections,
        }
    )


def test_llama3_8b_at_32k_on_128_ranks_by_hand():
    # TP 4 with SP, CP 4, DP 8; 8,192 tokens a rank.
    memory = estimate(run_config("llama3_8b", "gpu128_8b_32k", 32768), 128).largest
    attention = 4096 * (4096 + 1024 + 1024) + 4096 * 4096
    layer = (attention + 3 * 4096 * 14336) // 4 + 2 * 4096
    tables = 2 * (128256 // 4) * 4096
    assert memory.parameters == 32 * layer + tables + 4096 == 2_007_764_992
    assert memory.weights == 2 * 2_007_764_992
    assert memory.gradients == 4 * 2_007_764_992
    assert memory.optimizer == 12 * 2_007_764_992 // 32
    # Elements a token and layer: norms 4 h / 4; q and the output 2 x 4096 / 4; keys and values
    # of the whole sequence 2 x 1024 x 4 / 4; gate, up, product 3 x 14336 / 4; rotary
    # 4 x 128. One log-sum-exp a head.
    per_token = 2 * (4096 + 2048 + 2048 + 10752 + 512) + 4 * 8
    assert memory.activations == 32 * 8192 * per_token + 2 * 8192 * 1024 * 2 == 10_242_490_368
    # Gathered hidden states and their gradient; all rows of logits, and as many of hidden states
    # and their gradient; the gradient of the head; lse.
    hidden = 8192 * 4096 * 2
    loss = 4 * hidden + 8192 * 32064 * (4 + 2) + 32064 * 4096 * 4 + 8192 * 4
    assert memory.loss == loss == 2_369_814_528
    assert memory.total / GIB == pytest.approx(23.67, abs=0.01)
    # One of 4,096 where the rank has the whole vocabulary; what the recipe says, if it does.
    alone = run_config("llama3_8b", {}, 32768)
    hidden, head = 32768 * 4096 * 2, 128256 * 4096 * 4
    row = 128256 * 6 + 2 * 4096 * 2
    assert estimate(alone, 1).largest.loss == hidden + 4096 * row + head + 4 * 32768
    # A CPU's block is smaller.
    assert estimate(alone, 1, "cpu").largest.loss == hidden + 128 * row + head + 4 * 32768
    small = run_config("llama3_8b", {"loss_block_rows": 512}, 32768)
    assert estimate(small, 1).largest.loss == hidden + 512 * row + head + 4 * 32768


def test_llama3_70b_at_128k_on_512_ranks_by_hand():
    # TP 8 with SP, PP 4 with 5 virtual stages of 4 layers, CP 16, DP 1; 8,192 tokens a rank.
    run = run_config("llama3_70b", "gpu512_70b_128k", 131072)
    memory = estimate(run, 512)
    assert len(memory.stages) == 4
    first = memory.largest
    assert first is memory.stages[0]
    attention = 8192 * (8192 + 1024 + 1024) + 8192 * 8192
    layer = (attention + 3 * 8192 * 28672) // 8 + 2 * 8192
    assert first.parameters == 20 * layer + 128256 // 8 * 8192 == 2_270_756_864
    assert memory.stages[1].parameters == 20 * layer
    assert memory.stages[3].parameters == first.parameters + 8192
    assert first.optimizer == 12 * first.parameters // 16
    per_token = 2 * (4 * 1024 + 2 * 1024 + 2 * 1024 * 16 // 8 + 3 * 3584 + 4 * 128) + 4 * 8
    assert layer_activations(run) == 8192 * per_token
    assert [chunks_in_flight(run, stage, 64) for stage in range(4)] == [23, 21, 19, 17]
    assert first.activations == 23 * 4 * 8192 * per_token == 32_437_698_560
    assert [stage.loss > 0 for stage in memory.stages] == [False, False, False, True]
    assert first.total / GIB == pytest.approx(44.48, abs=0.01)


def test_interleaving_costs_what_the_paper_says():
    # Korthikanti et al. 2022, section 4.2.3: L layers become L (1 + (p - 1) / (p m)).
    model = {
        "num_layers": 48, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4,
    }  # fmt: skip
    for pipeline, virtual in [(2, 2), (4, 3), (8, 6)]:
        layout = {"pipeline": pipeline, "virtual_pipeline": virtual}
        run = run_config(model, layout, 1024)
        layers = chunks_in_flight(run, 0, 64) * 48 // (pipeline * virtual)
        assert layers == pytest.approx(48 * (1 + (pipeline - 1) / (pipeline * virtual)))
    run = run_config(model, {"pipeline": 4}, 1024)
    assert [chunks_in_flight(run, stage, 64) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(run, stage, 2) for stage in range(4)] == [2, 2, 2, 1]


def test_full_recomputation_keeps_the_inputs_and_one_layer():
    kept = estimate(run_config("llama3_8b", "gpu8_8b_32k", 32768), 8).largest
    layout = load_fragment("layout", "gpu8_8b_32k", "the test") | {"recompute": "full"}
    recomputed = estimate(run_config("llama3_8b", layout, 32768), 8).largest
    inputs = 32 * 32768 * 4096 * 2 // 8
    final_norm = 2 * 32768 * 4096 * 2 // 8
    one_layer = (kept.activations - final_norm) // 32
    assert recomputed.activations == inputs + one_layer + final_norm


def test_the_plan_says_what_recomputation_is_left_out():
    line = "layout.recompute selective: left out, as attention keeps nothing here"
    for context, said in ((1, True), (2, False)):
        layout = {"context": context, "recompute": "selective"}
        run = run_config("llama3_8b", layout, 32768)
        assert (line in describe_layout(run)) == said


def test_selective_recomputation_drops_the_gathered_keys_and_values():
    layout = {"context": 4, "recompute": "none"}
    run = run_config("llama3_8b", layout, 32768)
    selective = run_config("llama3_8b", layout | {"recompute": "selective"}, 32768)
    # Kept with: q, 4 x (k and v), the output. Without: the projection, q, k, the output.
    elements = (2 * 4096 + 4 * 2048) - (4096 + 2048 + 4096 + 1024 + 4096)
    assert layer_activations(run) - layer_activations(selective) == 8192 * 2 * elements


def test_experts_of_qwen3_30b_on_64_ranks_by_hand():
    # TP 4 with SP, CP 2, DP 8, EP 8: 16 of 128 experts on a rank, which 8 ranks hold alike.
    run = run_config("qwen3_30b_a3b", "gpu64_30ba3b_32k", 32768)
    memory = estimate(run, 64).largest
    experts = 48 * 16 * 3 * 2048 * 768
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512
    layer = attention // 4 + 2 * 2048 + 2 * 128 + 128 * 2048  # norms and the router are whole
    dense = 48 * layer + 2 * (151936 // 4) * 2048 + 2048
    assert memory.parameters == dense + experts
    assert memory.optimizer == 12 * dense // 16 + 12 * experts // 8
    save = estimate_save(run, 64)
    assert save.total_bytes == 14 * (4 * dense + 8 * experts)
    assert save.rank_bytes == -(-14 * dense // 16) + 14 * experts // 8
    text = describe_layout(run, 64)
    assert "expert      8 ranks, 16 experts on each; rank 0's group: 0 1 2 3 4 5 6 7" in text
    assert "parameters: 30.53 B, of which a token uses 3.35 B" in text


GPU_LAYOUTS = sorted(path.stem for path in (CONFIGS / "layouts").glob("gpu*.yaml"))


@pytest.mark.parametrize("name", GPU_LAYOUTS)
def test_shipped_layouts_fit_into_80_gb_or_say_that_they_need_more(name):
    gpus, size, length = name.split("_")
    model = {
        "1b": "llama32_1b", "8b": "llama3_8b", "70b": "llama3_70b", "30ba3b": "qwen3_30b_a3b",
        "8x7b": "mixtral_8x7b",
    }[size]  # fmt: skip
    said = "141 GB" in (CONFIGS / "layouts" / f"{name}.yaml").read_text()
    memory = 141e9 if said else 80e9
    sequence_length = int(length.removesuffix("k")) * 1024
    run = run_config(model, name, sequence_length)
    ranks = int(gpus.removeprefix("gpu"))
    assert check_layout(run, ranks).data
    total = estimate(run, ranks).largest.total
    assert total < 0.9 * memory, f"{total / GIB:.1f} GiB"


TINY = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4,
    "num_query_groups": 2, "vocab_size": 1000, "tie_word_embeddings": True, "qkv_bias": True,
    "qk_norm": True, "attention": "sdpa",
}  # fmt: skip


PHI = TINY | {"architecture": "phi", "qk_norm": False, "partial_rotary_factor": 0.5}


def measure(split: list[RunConfig], whole: list[RunConfig]) -> tuple[list[Any], list[int]]:
    """On each rank: count_parameters of runs, saved_bytes of others."""
    return [count_parameters(run) for run in split], [saved_bytes(run) for run in whole]


def count_parameters(run: RunConfig) -> tuple[int, int]:
    """This rank's parameters: counted in the model that was built, and by stage_parameters."""
    import torch
    from megatron.core import parallel_state

    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize

    world = initialize(run.layout, 1, 1)
    chunks = build_model(
        run.model, run.layout, max_sequence_length=64, dtype=torch.float32, device=world.device,
        seed=1,
    )  # fmt: skip
    stage = parallel_state.get_pipeline_model_parallel_rank()
    built = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return built, stage_parameters(run, stage) + expert_parameters(run)


def saved_bytes(run: RunConfig) -> int:
    """Bytes that autograd keeps in the forward pass of one sequence, without the parameters."""
    import torch

    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize

    world = initialize(run.layout, 1, 1)
    (model,) = build_model(
        run.model, run.layout, max_sequence_length=run.data.sequence_length,
        dtype=torch.float32, device=world.device, seed=1,
    )  # fmt: skip
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(1000, (1, run.data.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, torch.arange(tokens.shape[1])[None], None, labels=tokens)
    assert loss.requires_grad
    return sum(saved.values())


def test_parameters_and_activations_are_those_of_a_real_model():
    layout = {"tensor": 2, "sequence": True, "pipeline": 2}
    untied = PHI | {"tie_word_embeddings": False}
    split = [run_config(model, layout, 64, "fp32") for model in (TINY, PHI, untied)]
    # Wide enough for the layers to outweigh the loss; no qk_norm, which the formula leaves out.
    wide = {"hidden_size": 128, "ffn_hidden_size": 384, "qk_norm": False}
    whole = [run_config(model | wide, {}, 512, "fp32") for model in (TINY, PHI)]
    whole.append(run_config(PHI | wide | {"hidden_dropout": 0.1}, {}, 512, "fp32"))
    experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 200, "moe_router_topk": 3}
    split.append(run_config(
        {**TINY, **experts}, {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2}, 64, "fp32"
    ))  # fmt: skip
    whole.append(run_config({**TINY, **wide, **experts}, {}, 512, "fp32"))
    counts, kept = zip(*run_distributed(measure, 4, split, whole), strict=True)
    for built, counted in itertools.chain(*counts):
        assert built == counted
    # The CPU's extra of the docstring, for the final norm too, and the loss's few numbers per row;
    # its masks are numbers, and the embedding has one, too.
    extras = [4 * (4 * (2 * 384 + 2 * 128) + 128), 0, 4 * 2 * 3 * 128 + 4 * 128]
    *dense, routed = whole
    ((*saved_dense, saved_routed),) = set(map(tuple, kept))
    for run, extra, saved in zip(dense, extras, saved_dense, strict=True):
        expected = estimate(run, 4).largest.activations + 512 * extra
        assert saved == pytest.approx(expected, rel=0.02)
    # With experts a product more, of the weights with what is in their middle, and indices.
    assert saved_routed > estimate(routed, 4).largest.activations


def test_a_checkpoint_of_llama3_8b_on_64_ranks_by_hand():
    # TP 2, CP 4, DP 8: bf16 weights, float32 master weights and two moments, over 32 ranks.
    layout = {"tensor": 2, "sequence": True, "context": 4}
    run = run_config("llama3_8b", layout, 32768)
    attention = 4096 * (4096 + 1024 + 1024) + 4096 * 4096
    layer = (attention + 3 * 4096 * 14336) // 2 + 2 * 4096
    stage = 32 * layer + 2 * (128256 // 2) * 4096 + 4096
    save = estimate_save(run, 64, write_speed=10.0)
    assert save.total_bytes == 2 * stage * 14
    assert save.total_bytes / 1e9 == pytest.approx(112.4, abs=0.1)
    assert save.rank_bytes == stage * 14 // 32
    assert save.write_seconds == pytest.approx(11.24, abs=0.01)
    assert save.checksum_seconds == pytest.approx(1.757 / 2.3, abs=0.01)
    whole, time, share = describe_save(run, 64, 10.0)
    assert "112.43 GB in all" in whole and "1.76 GB" in whole
    assert time.startswith("  12.0 s at 10 GB/s") and "0.8 s of them" in time
    assert "every 1 steps" in share


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once_under_any_pipeline(tied):
    model = {
        "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4,
        "vocab_size": 512, "tie_word_embeddings": tied,
    }  # fmt: skip
    whole, halves = (
        estimate_save(run_config(model, {"pipeline": stages}, 1024)).total_bytes
        for stages in (1, 2)
    )
    assert whole == halves


def test_the_description_shows_groups_batch_work_and_memory():
    text = describe_layout(run_config("llama3_70b", "gpu512_70b_128k", 131072), 512)
    assert "layout: 512 ranks" in text
    assert "tensor      8 ranks, sequence parallel; rank 0's group: 0 1 2 3 4 5 6 7" in text
    assert "8,192 tokens of a sequence on each; rank 0's group: 0 8 16 24 ... 120" in text
    assert "pipeline    4 ranks, 5 x 4 layers on each; rank 0's group: 0 128 256 384" in text
    assert "64 sequences of 131,072 tokens = 8,388,608 tokens a step, 64 micro batches" in text
    assert "30.21" in text and "44.48" in text
    assert text.endswith("\n") and max(len(line) for line in text.splitlines()) <= 120
    text = describe_layout(run_config(TINY | {"vocab_size": None}, {}, 64))
    assert "1 ranks (the fewest possible)" in text and "the tokenizer's" in text
