"""On one GPU: windows of a 1B Llama beside Hugging Face transformers with the same weights, and how
much of the chip scorers of two sizes use."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lctw_megatron.benchmarks.chip import data_sheet_tflops
from lctw_megatron.benchmarks.large_model import LARGE
from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.benchmarks.steps import draw_weights
from lctw_megatron.config.load import load_fragment
from lctw_megatron.config.model_sizes import forward_tokens
from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.model.cross_entropy import IGNORE
from lctw_megatron.training.flops import forward_flops

WINDOW, STRIDE = 8192, 6144


def time_scoring(results: dict[str, Any]) -> None:
    """Windows of a 1B Llama beside Hugging Face's with the same weights, in one run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lctw_megatron.conversion.hf_import import import_hf
    from lctw_megatron.model.checkpoint import load_weights, read_manifest
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.scoring.forward import window_losses

    model = LARGE["model"]
    window, number = WINDOW, 8
    config = LlamaConfig.from_dict(
        {
            "hidden_size": model["hidden_size"],
            "intermediate_size": model["ffn_hidden_size"],
            "num_hidden_layers": model["num_layers"],
            "num_attention_heads": model["num_attention_heads"],
            "num_key_value_heads": model["num_query_groups"],
            "vocab_size": model["vocab_size"],
            "tie_word_embeddings": True,
            "max_position_embeddings": window,
        }
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        hf = LlamaForCausalLM._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        ).eval()
    world = initialize(LayoutConfig(), 1)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(Path(folder) / "hf")
        start = time.perf_counter()
        import_hf(Path(folder) / "hf", Path(folder) / "checkpoint")
        imported = time.perf_counter() - start
        manifest = read_manifest(Path(folder) / "checkpoint")
        chunks = build_model(
            manifest.model, LayoutConfig(), max_sequence_length=window,
            dtype=torch.bfloat16, device=world.device, seed=None,
        )  # fmt: skip
        load_weights(chunks, Path(folder) / "checkpoint")
    tokens, labels = random_windows(model["vocab_size"], number, world.device)
    outputs: dict[str, torch.Tensor] = {}

    def ours() -> None:
        losses = window_losses(chunks, tokens, labels, 2 * window)
        assert losses is not None
        outputs["ours"] = losses

    @torch.no_grad()
    def theirs() -> None:
        rows = []
        for row in tokens:
            logits = hf(row[None], use_cache=False).logits[0, :-1].float()
            rows.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
        outputs["theirs"] = torch.stack(rows)

    fast, slow = measure_in_turn([ours, theirs], world.device, 3)
    scored = labels[:, :-1] != IGNORE
    difference = (outputs["ours"][:, :-1] - outputs["theirs"])[scored].abs()
    results["scoring beside Hugging Face"] = {
        "tokens_per_second": number * window / fast.seconds,
        "hf_tokens_per_second": number * window / slow.seconds,
        "speed_ratio": slow.seconds / fast.seconds,
        "memory_ratio": fast.peak_bytes / slow.peak_bytes,
        "peak_gib": fast.peak_bytes / 2**30,
        "hf_peak_gib": slow.peak_bytes / 2**30,
        "mean loss difference": float(difference.mean()),
        "mean loss": float(outputs["theirs"][scored].mean()),
        "import seconds": imported,
    }


def random_windows(
    vocabulary: int, number: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and labels of ``number`` windows in the middle of a text: int64 [number, K]."""
    tokens = torch.randint(vocabulary, (number, WINDOW), device=device)
    labels = torch.roll(tokens, -1, 1)
    labels[:, -1] = IGNORE
    labels[:, : WINDOW - 1 - STRIDE] = IGNORE
    return tokens, labels


def time_scorers(results: dict[str, Any]) -> None:
    """Windows of SmolLM2-135M's shape and of a 1B Llama's, in forwards of 16,384 tokens and of as
    many as are taken without being told."""
    models = {"135M": load_fragment("model", "smollm2_135m", "the benchmark"), "1B": LARGE["model"]}
    for name, values in models.items():
        model = ModelConfig.model_validate(values)
        sizes = sorted({16384, forward_tokens(model, "cuda")})
        for tokens, row in scorer_speed(model, sizes, 64).items():
            results[f"scoring {name}, {tokens:,} tokens a forward"] = row


def scorer_speed(model: ModelConfig, sizes: list[int], number: int) -> dict[int, dict[str, float]]:
    """``number`` windows under random bf16 weights, for each number of tokens a forward."""
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.scoring.forward import window_losses

    world = initialize(LayoutConfig(), 1)
    chunks = build_model(
        model, LayoutConfig(), max_sequence_length=WINDOW, dtype=torch.bfloat16,
        device=world.device, seed=None, packed=False,
    )  # fmt: skip
    draw_weights(chunks, model)
    assert model.vocab_size is not None
    tokens, labels = random_windows(model.vocab_size, number, world.device)
    costs = measure_in_turn(
        [lambda size=size: window_losses(chunks, tokens, labels, size) for size in sizes],  # type: ignore
        world.device,
        3,
    )
    scored = int((labels[0] != IGNORE).sum())
    tera = number * forward_flops(model, [WINDOW], scored) / 1e12
    return {
        size: {
            "tokens_per_second": number * WINDOW / cost.seconds,
            "tflops_per_second": tera / cost.seconds,
            "utilisation": tera / cost.seconds / data_sheet_tflops(),
            "peak_gib": cost.peak_bytes / 2**30,
        }
        for size, cost in zip(sizes, costs, strict=True)
    }
