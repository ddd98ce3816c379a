"""Experts on GPUs: EP2 trains as one GPU does, with experts one after the other and in grouped
kernels, and both alike.

In bfloat16 the input of a router differs in its last bits between layouts and engines, so that a
token whose experts are close may go to another: losses are held to 5e-3, gradient norms to 5e-2.
"""

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.gpu.runs import ENGINES, Case, make_data, trainings

EXPERTS = {
    "num_moe_experts": 8, "moe_ffn_hidden_size": 256, "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.02,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"expert": 2},
    "EP2xTP2": {"expert": 2, "tensor": 2, "sequence": True},
    "EP2xCP2": {"expert": 2, "context": 2, "recompute": "mlp"},
    "PP2": {"pipeline": 2},
}
CASES = [("chunk", "dense frozen"), ("pack", "longce self")]
COMPARED = ("loss/weighted", "loss/plain", "grad_norm", "router/balance_loss")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("gpu_experts"))


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def train(prefix: str, folder: Any, ranks: int, cases: list[Case]) -> list[dict[str, Any]]:
    with_experts = [
        (engine, {**layout, "model": EXPERTS}, *rest) for engine, layout, *rest in cases
    ]
    arguments = (prefix, str(folder), with_experts)
    backend = "cpu:gloo,cuda:nccl"
    return run_distributed(trainings, ranks, *arguments, timeout=500.0, backend=backend)[0]


def check(found: dict[str, Any], expected: dict[str, Any], exact: bool, what: Any) -> None:
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        for name in COMPARED:
            allowed = 1e-5 if exact else 5e-2 if name == "grad_norm" else 5e-3
            assert ours[name] == pytest.approx(theirs[name], rel=allowed), (what, name)


def marked(names: Any) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.engine] if "Engine" in n else []) for n in names]


@pytest.mark.gpus(2)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", marked(ENGINES))
def test_experts_on_two_gpus_train_as_on_one(engine: str, prefix: str, tmp_path: Any) -> None:
    alone = train(prefix, tmp_path / "1", 1, [(engine, {}, *case) for case in CASES])
    cases = [(engine, layout, *case) for layout in LAYOUTS.values() for case in CASES]
    found = iter(train(prefix, tmp_path / "2", 2, cases))
    for layout in LAYOUTS:
        for case, expected in zip(CASES, alone, strict=True):
            check(next(found), expected, "fp32" in engine, (layout, case))


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_grouped_kernels_give_what_single_experts_give(prefix: str, tmp_path: Any) -> None:
    engines = ("ours bf16", "TransformerEngine bf16")
    ours, theirs = train(prefix, tmp_path, 1, [(e, {}, "chunk", "dense frozen") for e in engines])
    check(theirs, ours, False, "engines")
