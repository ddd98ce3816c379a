"""HybridModel trains as GPTModel does, with TransformerEngine's layers in it and with ours."""

from typing import Any

import pytest

from tests.gpu.runs import engines, train
from tests.gpu.test_layouts import allowed_differences, differences, is_sparse
from tests.training.layouts import needs_hybrid

pytestmark = [needs_hybrid, pytest.mark.usefixtures("nothing_is_compiled")]

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2+VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2 recompute full": {"context": 2, "recompute": "full"},
}
CASES = [("chunk", "dense frozen"), ("pack", "sparse self")]


@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=[pytest.mark.gpus(2), pytest.mark.timeout(1200)])]
)
@pytest.mark.parametrize("engine", engines())
def test_three_steps_are_those_of_gptmodel(
    engine: str, ranks: int, prefix: str, tmp_path: Any
) -> None:
    layouts = LAYOUTS if ranks > 1 else {"alone": {}}
    answers = [
        train(
            prefix,
            tmp_path / kind,
            ranks,
            [
                (engine, layout | {"megatron": {"model": kind}}, *case)
                for layout in layouts.values()
                for case in CASES
            ],
        )
        for kind in ("gpt", "hybrid")
    ]
    names = [(name, case) for name in layouts for case in CASES]
    for (name, case), gpt, hybrid in zip(names, *answers, strict=True):
        found = differences(hybrid, gpt)
        for metric, allowed in allowed_differences(engine, name, is_sparse(case)).items():
            assert found[metric] <= allowed, (name, case, metric, found)
