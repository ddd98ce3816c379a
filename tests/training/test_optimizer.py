"""The optimizer's settings are the recipe's: decay by group, after a resume too, and whichever Adam
saved the moments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.training.loop import Trainer
from tests.distributed import run_distributed
from tests.training.layouts import gather, make_data, make_run, relative_error, shards

# An eps of the size of the gradients: else one near 0 makes a step of full size, whatever its sign.
ADAM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.5, "adam_eps": 1e-2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("optimizer"))


def run_of(data: str, folder: str, layout: dict[str, Any], **training: Any) -> RunConfig:
    return make_run(data, folder, layout, "pack", "dense", "frozen", training=ADAM | training)


def trained(data: str, folder: str, layouts: dict[str, dict[str, Any]]) -> list[Any]:
    """This rank's weights after three steps of the trainer under each layout."""
    answers = []
    for name, layout in layouts.items():
        trainer = Trainer(run_of(data, f"{folder}/{name}", layout))
        try:
            for step in range(3):
                trainer.stepper.step(step, list(trainer.loader.step(step)))
            answers.append(shards(trainer.chunks))
        finally:
            trainer.close()
    return answers


def by_torch(run: RunConfig) -> dict[str, np.ndarray]:
    """The same steps by torch's AdamW in two groups, on the gradients of one process."""
    trainer = Trainer(run)
    try:
        named = dict(trainer.chunks[0].named_parameters())
        # Megatron-LM's rule: biases and everything of one dimension (norms) are not decayed.
        plain = [p for n, p in named.items() if p.ndim == 1 or n.endswith("bias")]
        decayed = [p for p in named.values() if not any(p is other for other in plain)]
        assert plain and decayed
        copies = {id(p): p.detach().clone() for p in named.values()}
        adam = torch.optim.AdamW(
            [
                {"params": [copies[id(p)] for p in decayed], "weight_decay": 0.5},
                {"params": [copies[id(p)] for p in plain], "weight_decay": 0.0},
            ],
            lr=1e-2, betas=(0.9, 0.95), eps=1e-2,
        )  # fmt: skip
        for step in range(3):
            trainer.stepper.gradients(step, list(trainer.loader.step(step)))
            for parameter in named.values():
                copies[id(parameter)].grad = parameter.main_grad.clone()
            adam.step()
            for parameter in named.values():
                parameter.data.copy_(copies[id(parameter)])
        return gather([shards(trainer.chunks)])
    finally:
        trainer.close()


def test_norms_and_biases_are_not_decayed_on_any_layout(data: str, tmp_path: Path) -> None:
    expected = by_torch(run_of(data, str(tmp_path / "torch"), {}))
    answers = [[rank] for rank in trained(data, str(tmp_path / "alone"), {"one process": {}})]
    names = ["one process", *LAYOUTS]
    ranks = run_distributed(trained, 2, data, str(tmp_path / "two"), LAYOUTS)
    answers += [list(both) for both in zip(*ranks, strict=True)]
    for name, found in zip(names, answers, strict=True):
        whole = gather(found)
        for parameter, weight in expected.items():
            assert relative_error(whole[parameter], weight) < 1e-5, (name, parameter)


def inner(trainer: Trainer) -> Any:
    """megatron-core's distributed optimizer."""
    return getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])[0]


def state_of(part: Any, parameter: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The group of a parameter and its moments."""
    group, order = part.model_param_group_index_map[parameter]
    found = part.optimizer.param_groups[group]
    return found, part.optimizer.state[found["params"][order]]


def steps(run: RunConfig, numbers: range, save: bool = False) -> tuple[list[float], Any]:
    trainer = Trainer(run)
    try:
        assert trainer.first_step == numbers.start
        metrics = [trainer.stepper.step(n, list(trainer.loader.step(n))) for n in numbers]
        if save:
            trainer.save(numbers.stop)
        return [step["loss/plain"] for step in metrics], gather([shards(trainer.chunks)])
    finally:
        trainer.close()


def test_what_the_recipe_says_acts_after_a_resume(data: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    steps(run_of(data, folder, {}), range(2), save=True)
    changed = {"weight_decay": 10.0, "adam_beta1": 0.0, "adam_beta2": 0.5, "adam_eps": 1.0}
    trainer = Trainer(run_of(data, folder, {}, **changed))
    try:
        part, named = inner(trainer), dict(trainer.chunks[0].named_parameters())
        before = {
            name: (p.detach().clone(), state_of(part, p)[1]["exp_avg_sq"].clone())
            for name, p in named.items()
        }
        trainer.stepper.step(2, list(trainer.loader.step(2)))
        for name, parameter in named.items():
            weight, squares = before[name]
            gradient = parameter.main_grad
            decay = 0.0 if weight.ndim == 1 else 10.0
            squares = 0.5 * squares.view_as(gradient) + 0.5 * gradient**2
            corrected = (squares / (1 - 0.5**3)).sqrt()
            expected = weight * (1 - 1e-2 * decay) - 1e-2 * gradient / (corrected + 1.0)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    finally:
        trainer.close()


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the groups of TransformerEngine's and apex's: a whole number of steps and the
    switches of the kernel in every group, nothing but moments for a parameter."""

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float,
        adam_w_mode: bool, bias_correction: bool = True, **switches: Any,
    ) -> None:  # fmt: skip
        assert adam_w_mode
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults | {"bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int and group["bias_correction"]
            one, two = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                assert state.keys() <= {"exp_avg", "exp_avg_sq"}
                if not state:
                    state |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                state["exp_avg"].lerp_(p.grad, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                mean = state["exp_avg"] / (1 - one ** group["step"])
                size = (state["exp_avg_sq"] / (1 - two ** group["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / size)


def use(adam: str, patch: pytest.MonkeyPatch) -> None:
    """Let megatron-core believe that it found TransformerEngine's optimizers, or none."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    fused = adam == "fused"
    for module in (optimizer, distrib_optimizer):
        patch.setattr(module, "Adam", FusedAdam if fused else torch.optim.Adam)
    patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", not fused)
    patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", fused)
    patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", fused)


@pytest.mark.parametrize("saved", [2, 0])
@pytest.mark.parametrize(("wrote", "reads"), [("torch", "fused"), ("fused", "torch"),
                                              ("fused", "fused")])  # fmt: skip
def test_the_moments_that_one_adam_saved_another_goes_on_with(
    wrote: str, reads: str, saved: int, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a run that saves before its first good step."""
    losses, weights = steps(run_of(data, str(tmp_path / "whole"), {}), range(4))
    run = run_of(data, str(tmp_path / "run"), {})
    use(wrote, monkeypatch)
    first, _ = steps(run, range(saved), save=True)
    use(reads, monkeypatch)
    then, found = steps(run, range(saved, 4))
    assert first + then == pytest.approx(losses, rel=1e-6)
    for name, weight in weights.items():
        assert relative_error(found[name], weight) < 1e-5, name
