"""What would make the host wait for a GPU inside a step: nothing that grows with the micro batches.

Counted on the CPU, by the operations whose result's size or value the host must know. tests/gpu
counts the waits themselves.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lctw_megatron.training.loop import Trainer
from tests.training.layouts import make_data, make_run


class Waits(TorchDispatchMode):
    """Names of the operations that a GPU's host would wait for, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [a for a in args[1] if a is not None and a.dtype == torch.bool] if (
            name in ("index", "index_put", "index_put_")
        ) else []  # fmt: skip
        if masks or name in ("nonzero", "_local_scalar_dense", "masked_select", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("waits"))


def waits(data: str, folder: str, packing: str, weighting: dict[str, Any], batch: int) -> int:
    """Of forwards, weights and backwards of a step of ``batch`` / 2 micro batches, with the sums
    that follow them."""
    run = make_run(
        data, folder, {}, packing, "dense", "frozen", training={"global_batch_size": batch},
    )  # fmt: skip
    values = run.model_dump() | {"weighting": run.weighting.model_dump() | weighting}
    trainer = Trainer(type(run).model_validate(values))
    counted = Waits()
    try:
        stepper = trainer.stepper
        schedule = stepper._schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            with counted:
                return schedule(*args, **kwargs)

        with mock.patch.object(stepper, "_schedule", counting):
            stepper.gradients(0, list(trainer.loader.step(0)))
    finally:
        trainer.close()
    return len(counted.found)


@pytest.mark.parametrize("packing", ["chunk", "pack"])
def test_waits_do_not_grow_with_the_micro_batches_unless_weights_are_zero(
    data: str, tmp_path: Path, packing: str
) -> None:
    # Only rows of weight 0 are worth a wait: the head's backward skips them.
    for name, growth, weighting in [
        ("uniform", 0, {"scheme": "uniform"}),
        ("dense", 0, {"scheme": "dense", "interpolation": 0.25}),
        ("sparse", 1, {"scheme": "sparse", "interpolation": 0.0, "keep_fraction": 0.2}),
    ]:
        few, many = (
            waits(data, f"{tmp_path}/{name}{batch}", packing, weighting, batch) for batch in (2, 6)
        )
        assert many - few == 2 * growth, name
        assert few <= 2 + growth, name
