"""With `training.deterministic` layouts that do the arithmetic of one GPU train as it does to the
last bit, in bf16: losses, largest weights and validation of three steps. The gradient norm is a
float32 sum over ranks, within 1e-6, the effective number of weights a float64 one, within 1e-15.
Without it attention's backward adds in any order."""

from typing import Any

import pytest

from tests.gpu.runs import Case, on_gpus, trainings
from tests.gpu.test_layouts import differences

LAYOUTS: dict[str, dict[str, Any]] = {
    "PP2": {"pipeline": 2},
    "PP2+VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2": {},
}
CASES = [("chunk", "uniform"), ("pack", "dense frozen"), ("chunk", "sparse self")]


def train(prefix: str, folder: str, cases: list[Case]) -> list[dict[str, Any]]:
    from lctw_megatron.platform.gpu import use_deterministic_kernels

    use_deterministic_kernels(True)  # as the training loop does for `training.deterministic`
    return trainings(prefix, folder, cases)


@pytest.mark.gpus(2)
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize(
    "engine", ["ours bf16", pytest.param("TransformerEngine bf16", marks=pytest.mark.engine)]
)
def test_stages_and_copies_train_as_one_gpu_to_the_last_bit(
    engine: str, prefix: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def results(ranks: int, cases: list[Case]) -> list[dict[str, Any]]:
        return on_gpus(train, ranks, prefix, str(tmp_path / f"{ranks}"), cases)[0]

    alone = results(1, [(engine, {}, *case) for case in CASES])
    split = results(2, [(engine, layout, *case) for layout in LAYOUTS.values() for case in CASES])
    rows = [differences(*pair) for pair in zip(split, alone * len(LAYOUTS), strict=True)]
    with capsys.disabled():
        for start, layout in zip(range(0, len(rows), len(CASES)), LAYOUTS, strict=True):
            own = rows[start : start + len(CASES)]
            largest = {name: max(row[name] for row in own) for name in own[0]}
            shown = "  ".join(f"{name} {value:.1e}" for name, value in largest.items())
            print(f"\n{engine}, deterministic, {layout}: {shown}", end="", flush=True)
    for row in rows:
        assert row.pop("grad_norm") <= 1e-6
        assert row.pop("weights/n_eff") <= 1e-15
        assert not any(row.values()), rows
