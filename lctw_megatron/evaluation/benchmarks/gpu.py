"""On one GPU: the same numbers as on the CPU, and how fast. Checks first, then timings.

Everything is reached through torch alone; TransformerEngine and apex are not needed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.benchmarks.attention import attention_benchmark
from lctw_megatron.evaluation.benchmarks.head import head_benchmark
from lctw_megatron.evaluation.benchmarks.steps import StepBench, random_batches, step_benchmark

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 rates of the vendor's data sheets, for the model FLOP utilisation."""

SMALL: dict[str, Any] = {
    "name": "small", "run_dir": "none", "seed": 11,
    "data": {"train": [], "sequence_length": 256},
    "model": {
        "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4,
        "num_query_groups": 2, "vocab_size": 1000,
    },
    "weighting": {"scheme": "dense", "interpolation": 0.5, "window": 64},
    "training": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
}  # fmt: skip

LARGE: dict[str, Any] = {
    "name": "large", "run_dir": "none",
    "data": {"train": [], "sequence_length": 32768},
    "model": {  # Llama 3.2 1B, with heads of 128 as all larger Llamas have, not of 64
        "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16,
        "num_query_groups": 4, "vocab_size": 128256, "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "layout": {"recompute": "mlp", "loss_block_rows": 4096},
    "training": {"steps": 1, "global_batch_size": 1, "precision": "bf16"},
}  # fmt: skip

WEIGHTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"scheme": "uniform"},
    "frozen dense": {
        "scheme": "dense", "interpolation": 0.75, "window": 8192, "stride": 6144,
    },
    "self-scoring dense": {
        "scheme": "dense", "interpolation": 0.75, "mode": "self", "window": 8192, "stride": 6144,
        "tokens_per_forward": 32768,
    },
}  # fmt: skip


def small_pass(precision: str) -> dict[str, np.ndarray]:
    """Losses and all gradients of one weighted forward and backward of a small model."""
    values = SMALL | {"training": SMALL["training"] | {"precision": precision}}
    run = RunConfig.model_validate(values)
    bench = StepBench(run)
    stepper = bench.stepper(SMALL["weighting"])
    batches = random_batches(run, 1)
    from lctw_megatron.training.metrics import move

    batch = move(batches[0], bench.device)
    with torch.no_grad():
        losses = bench.chunks[0](
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"]
        )
    stepper.gradients(0, batches)
    result = {"losses": losses.float().cpu().numpy()}
    for name, parameter in bench.chunks[0].named_parameters():
        result[name] = parameter.main_grad.float().cpu().numpy()
    return result


def check_small_model(results: dict[str, Any]) -> None:
    """float32 and bf16 losses and gradients beside those of a CPU process."""
    for precision, allowed in (("fp32", 1e-4), ("bf16", 2e-2)):
        here = small_pass(precision)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cpu.npz"
            command = [sys.executable, "-m", __name__, precision, str(path)]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            there = dict(np.load(path))
        errors = {
            name: float(np.linalg.norm(here[name] - value) / np.linalg.norm(value))
            for name, value in there.items()
        }
        worst = max(errors, key=lambda name: errors[name])
        results[f"small model {precision}"] = {
            "losses": errors["losses"], "worst gradient": errors[worst], "of": worst,
            "allowed": allowed, "passed": errors[worst] < allowed,
        }  # fmt: skip


def check_attention(results: dict[str, Any]) -> None:
    """Packed bf16 attention with a document mask beside float64 on the CPU, and its kernels."""
    from lctw_megatron.model.attention import attend

    generator = torch.Generator().manual_seed(3)
    length, bounds = 1024, [[0, 1, 100, 611, 1024], [0, 512, 1024, 1024, 1024]]
    boundaries = torch.tensor(bounds, dtype=torch.int32)
    inputs = [
        torch.randn(length, 2, heads, 64, generator=generator).to(torch.bfloat16)
        for heads in (8, 2, 2)
    ]
    upstream = torch.randn(length, 2, 8, 64, generator=generator).to(torch.bfloat16)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(device, dtype).detach().requires_grad_() for x in inputs]
        out = attend(leaves[0], leaves[1], leaves[2], boundaries)
        out.backward(upstream.to(device, dtype))
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return [x.detach().double().cpu() for x in (out, *gradients)]

    right = run("cpu", torch.float64)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = run("cuda", dtype)
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))
        results[f"attention {str(dtype)[6:]}"] = {
            "relative error": error, "allowed": allowed, "passed": error < allowed,
        }  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run("cuda", torch.bfloat16)
        leaves = [x[:, :1].cuda().requires_grad_() for x in inputs]
        attend(leaves[0], leaves[1], leaves[2]).sum().backward()
    names = sorted({event.key for event in profile.key_averages() if "flash" in event.key.lower()})
    results["flash kernels"] = {"names": [name[:90] for name in names], "passed": bool(names)}


def check_golden(results: dict[str, Any], golden: Path) -> None:
    """The golden long and short losses of the tiny Llama, imported from its HF folder."""
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.conversion.hf_import import import_hf
    from lctw_megatron.model.checkpoint import load_weights, read_manifest
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.scoring.forward import window_losses
    from lctw_megatron.scoring.self_scoring import cut_windows

    scores = np.load(golden / "scores.npz")
    world = initialize(LayoutConfig(), 1)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "checkpoint"
        import_hf(golden / "model", target)
        chunks = build_model(
            read_manifest(target).model, LayoutConfig(), max_sequence_length=512,
            dtype=torch.float32, device=world.device, seed=None,
        )  # fmt: skip
        load_weights(chunks, target)
    text = torch.from_numpy(scores["tokens"]).long()
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    positions = torch.arange(511, device=world.device).expand(2, -1)
    with torch.no_grad():
        long = chunks[0](tokens.cuda(), positions, None, labels=labels.cuda()).cpu().numpy()
    batch = {"sequence_tokens": tokens, "sequence_labels": labels}
    window_tokens, window_labels, where = cut_windows(batch, 128, 96, None)
    losses = window_losses(chunks, window_tokens, window_labels, 4096)
    assert losses is not None
    flat = np.full(2 * 511, np.nan, dtype=np.float32)
    scored = where >= 0
    flat[where[scored].numpy()] = losses.cpu()[scored].numpy()
    short = flat.reshape(2, 511)
    error = max(
        float(np.abs(long - scores["long_loss"]).max()),
        float(np.nanmax(np.abs(short - scores["short_loss"]))),
    )
    results["golden losses"] = {"largest error": error, "allowed": 1e-4, "passed": error < 1e-4}


def time_steps(results: dict[str, Any]) -> None:
    """A 1B Llama at 32k tokens: a step under each weighting, and where the time of one goes."""
    run = RunConfig.model_validate(LARGE)
    rate = next(
        (v for k, v in PEAK_TFLOPS.items() if k in torch.cuda.get_device_name()), float("nan")
    )
    steps = step_benchmark(run, WEIGHTINGS, repeats=3)
    everything_kept = RunConfig.model_validate(LARGE | {"layout": {"loss_block_rows": 4096}})
    uniform = {"nothing recomputed": WEIGHTINGS["uniform"]}
    steps |= step_benchmark(everything_kept, uniform, repeats=3)
    for name, row in steps.items():
        row["utilisation"] = row["tflops_per_second"] / rate
        results[f"step {name}"] = row


def profile_step(results: dict[str, Any]) -> None:
    """The kernels of one uniform step that take most of its time."""
    run = RunConfig.model_validate(LARGE)
    bench = StepBench(run)
    stepper = bench.stepper(WEIGHTINGS["uniform"])
    batches = random_batches(run, 1)
    stepper.step(0, batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stepper.step(0, batches)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    results["profile"] = {
        "total ms": total / 1e3,
        "kernels": [
            [round(100 * e.self_device_time_total / total, 1), e.count, e.key[:100]]
            for e in events[:25]
        ],
    }


def time_head(results: dict[str, Any]) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    for block_rows in (1024, 4096):
        results[f"head, blocks of {block_rows}"] = head_benchmark(
            32768, 2048, 128256, device, dtype, block_rows=block_rows
        )


def time_attention(results: dict[str, Any]) -> None:
    results["attention with documents"] = attention_benchmark(
        16384, 32, 8, 64, 8, torch.device("cuda"), torch.bfloat16
    )


def time_scoring(results: dict[str, Any]) -> None:
    """Windows of a 1B Llama beside Hugging Face's with the same weights, in one run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.conversion.hf_import import import_hf
    from lctw_megatron.evaluation.benchmarks.measure import measure_in_turn
    from lctw_megatron.model.checkpoint import load_weights, read_manifest
    from lctw_megatron.model.cross_entropy import IGNORE
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.scoring.forward import window_losses

    model = LARGE["model"]
    window, stride, number = 8192, 6144, 8
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
    tokens = torch.randint(model["vocab_size"], (number, window), device="cuda")
    labels = torch.roll(tokens, -1, 1)
    labels[:, -1] = IGNORE
    labels[:, : window - 1 - stride] = IGNORE
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


def gpu_benchmark(output: Path, golden: Path, only: list[str]) -> int:
    """Run all parts (or ``only`` those named), print a table, write all numbers to ``output``.

    A part that fails does not keep the others from running. Returns 1 if a check did not pass.
    """
    if not torch.cuda.is_available():
        raise InputError("benchmark gpu: torch sees no GPU; run it on a machine that has one")
    parts: dict[str, Callable[[dict[str, Any]], None]] = {
        "small": check_small_model,
        "attention": check_attention,
        "golden": lambda results: check_golden(results, golden),
        "steps": time_steps,
        "profile": profile_step,
        "head": time_head,
        "documents": time_attention,
        "scoring": time_scoring,
    }
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bf16 matmul TFLOP/s": _matmul_rate(),
    }
    failed = False
    for name in only or parts:
        start = time.perf_counter()
        try:
            parts[name](results)
        except Exception as error:
            import traceback

            traceback.print_exc()
            results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
        print(f"[{name}: {time.perf_counter() - start:.1f} s]", flush=True)
        torch.cuda.empty_cache()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1))
    for name, row in results.items():
        failed |= isinstance(row, dict) and row.get("passed") is False
        if not isinstance(row, dict):
            print(f"{name}: {row}")
            continue
        if name == "profile":
            print(f"profile: {row.get('total ms', 0):.0f} ms")
            for kernel in row.get("kernels", [])[:14]:
                print("   {:5.1f} %  {:5d} x  {}".format(*kernel))
            continue
        text = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        )
        print(f"{name}: {text}")
    return int(failed)


def _matmul_rate() -> float:
    """TFLOP/s of an 8192-cubed bf16 product on random data: what the chip gives here and now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    from lctw_megatron.evaluation.benchmarks.measure import measure

    cost = measure(lambda: [a @ b for _ in range(10)], torch.device("cuda"), 5)
    return round(10 * 2 * 8192**3 / cost.seconds / 1e12, 1)


if __name__ == "__main__":  # the CPU side of check_small_model
    np.savez(sys.argv[2], **small_pass(sys.argv[1]))  # type: ignore[arg-type]
