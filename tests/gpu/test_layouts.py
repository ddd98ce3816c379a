"""Every layout of the GPUs at hand trains as one GPU does: three steps and a validation by the real
trainer over NCCL.

float32: losses, gradient norms and weights' statistics within 1e-5. bf16: losses within 2e-3,
gradient norms within 2e-2. Pipeline stages do the arithmetic of one GPU: the losses of their first
step are equal to the last bit.

`sparse` is no continuous function of the losses: of two targets at the threshold whose scores
differ in the last bits one layout keeps the one, another the other, at weight 5. In float32 that
does not happen here. In bf16 it does: `sparse` has a line of its own in the table, and its weighted
loss and gradient norm are held to 1e-2 and 5e-2.
"""

import itertools
from typing import Any

import pytest

from lctw_megatron.platform.capabilities import capabilities
from tests.gpu.runs import WEIGHTINGS, engines, train

pytestmark = pytest.mark.usefixtures("nothing_is_compiled")

# Buckets of about a layer, so that there is something to overlap.
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 500_000}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "DP2 overlapped": (2, {"megatron": {"ddp": OVERLAP}}),
    "CP2 overlapped": (2, {"context": 2, "megatron": {"ddp": OVERLAP}}),
    "PP2+VPP2 overlapped": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "megatron": {"ddp": OVERLAP}},
    ),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2+VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP2 recompute full": (2, {"context": 2, "recompute": "full"}),
    "CP2 recompute selective": (2, {"context": 2, "recompute": "selective"}),
    "TP2 recompute mlp": (2, {"tensor": 2, "recompute": "mlp"}),
    "TP2xCP2": (4, {"tensor": 2, "context": 2}),
    "TP2+SPxPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
    "PP2+VPP2xCP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    "CP4": (4, {"context": 4}),
    "TP2xCP2xDP2": (8, {"tensor": 2, "context": 2}),
    "TP2xPP2xCP2": (8, {"tensor": 2, "pipeline": 2, "context": 2}),
}
CASES = list(itertools.product(("chunk", "pack"), WEIGHTINGS))
COMPARED = ("loss/weighted", "loss/plain", "grad_norm", "weights/n_eff", "weights/max")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference over the steps, by metric; validation beside them."""
    result: dict[str, float] = {}
    pairs = list(zip(found["metrics"], expected["metrics"], strict=True))
    for name in COMPARED:
        gaps = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-30) for a, b in pairs if name in b]
        result[name] = max(gaps, default=0.0)
    ours, theirs = (x["validation"]["validation/loss/plain"] for x in (found, expected))
    result["validation"] = abs(ours - theirs) / theirs
    first, right = pairs[0]
    result["first loss"] = abs(first["loss/plain"] - right["loss/plain"])
    return result


@pytest.mark.gpus(2)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", engines())
def test_every_layout_trains_as_one_gpu(
    engine: str, prefix: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = train(prefix, tmp_path, 1, [(engine, {}, *case) for case in CASES])
    failures, lines = [], []
    for ranks in (2, 4, 8):
        names = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
        if ranks > capabilities().gpus:
            lines.append(f"{', '.join(names)}: not run, {capabilities().gpus} GPUs here")
            continue
        cases = [(engine, LAYOUTS[name][1], *case) for name in names for case in CASES]
        answers = iter(train(prefix, tmp_path, ranks, cases))
        for name in names:
            rows = {case: differences(next(answers), right) for case, right in zip(
                CASES, alone, strict=True)}  # fmt: skip
            for sparse in (False, True):
                chosen = [row for case, row in rows.items() if is_sparse(case) == sparse]
                largest = {metric: max(row[metric] for row in chosen) for metric in chosen[0]}
                shown = "  ".join(f"{metric} {value:.1e}" for metric, value in largest.items())
                lines.append(f"{name + (' sparse' if sparse else ''):32} {shown}")
            failures += [
                (name, case, metric, row[metric], allowed)
                for case, row in rows.items()
                for metric, allowed in allowed_differences(engine, name, is_sparse(case)).items()
                if not row[metric] <= allowed
            ]
    with capsys.disabled():
        print(f"\n{engine}, {capabilities().line()}\n  " + "\n  ".join(lines), flush=True)
    assert not failures, "\n".join(map(str, failures))


def is_sparse(case: tuple[str, str]) -> bool:
    return case[1].startswith("sparse")


def allowed_differences(engine: str, layout: str, sparse: bool) -> dict[str, float]:
    if engine.endswith("fp32"):
        allowed = {name: 1e-5 for name in (*COMPARED, "validation")}
    else:
        allowed = {"loss/weighted": 2e-3, "loss/plain": 2e-3, "validation": 2e-3, "grad_norm": 2e-2}
        if sparse:
            allowed |= {"loss/weighted": 1e-2, "grad_norm": 5e-2}
    if layout in ("PP2", "PP2+VPP2", "PP2+VPP2 overlapped", "PP4"):
        allowed["first loss"] = 0.0
    return allowed
