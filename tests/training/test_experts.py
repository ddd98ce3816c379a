"""Training with experts: every layout gives one process's losses and gradients, the balance among
them, in float64 to 1e-10; the trainer's norm, clipping, weights and checkpoints go with it.

Routing is exact here as long as no two experts of a token are closer than rounding is.
"""

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lctw_megatron.config.schema import RunConfig
from tests.distributed import run_distributed
from tests.training.layouts import (
    KINDS,
    SCHEMES,
    gather,
    make_data,
    make_run,
    needs_hybrid,
    one_pass,
    relative_error,
    three_steps,
)

EXPERTS = dict(
    num_moe_experts=4, moe_ffn_hidden_size=20, moe_router_topk=2, moe_aux_loss_coeff=0.05,
    num_layers=2,
)  # fmt: skip
BATCH = 4
WIDE = {"num_layers": 4}
UNSCALED = {"norm_topk_prob": False, "moe_router_topk": 1}

IDLE = {"moe_router_topk": 1, "norm_topk_prob": False, "moe_aux_loss_coeff": 0.0}
"""All tokens go to two of four experts (``leave_experts_idle``): one rank of EP2 gets none."""

Case = tuple[dict[str, Any], str, str, str, dict[str, Any], int]
"""layout, packing, scheme, mode, changes of the model, micro batch"""

SP2: dict[str, Any] = {"tensor": 2, "sequence": True}
CASES: dict[int, list[Case]] = {
    2: [
        ({"expert": 2}, "pack", "dense", "self", {}, 2),
        ({"expert": 2}, "pack", "dense", "self", IDLE, 2),
        ({"expert": 2, "recompute": "full"}, "chunk", "sparse", "frozen", {}, 1),
        ({"expert": 2, "recompute": "mlp"}, "chunk", "uniform", "frozen", UNSCALED, 2),
        ({"expert": 2, **SP2}, "chunk", "sparse", "frozen", {}, 2),
        (SP2, "pack", "dense", "self", {}, 2),
        ({"expert": 2, "context": 2}, "pack", "dense", "self", {}, 2),
    ],
    4: [
        ({"expert": 2, "pipeline": 2}, "pack", "dense", "self", {}, 1),
        (
            {"expert": 2, "pipeline": 2, "virtual_pipeline": 2},
            "chunk", "sparse", "self", WIDE, 1,
        ),
        ({"expert": 2, "pipeline": 2, **SP2}, "pack", "dense", "self", {}, 2),
        ({"expert": 4, "context": 2, **SP2}, "chunk", "uniform", "frozen", {}, 1),
        ({"expert": 2, "context": 2}, "pack", "dense", "self", {}, 1),
    ],
}  # fmt: skip
"""Ranks, and what is tried on them: EP2 x {DP2, TP2, CP2, PP2} and more."""


def expert_run(prefix: str, folder: str, case: Case, **changes: Any) -> RunConfig:
    layout, packing, scheme, mode, model, micro_batch = case
    weighting = dict(SCHEMES[scheme])
    if mode == "self":
        # One window a forward: ranks that share experts have different numbers of them to run.
        weighting |= dict(mode="self", window=32, stride=24, tokens_per_forward=32)
    training = {"micro_batch_size": micro_batch, "global_batch_size": BATCH}
    training |= changes.pop("training", {})
    return make_run(
        prefix, folder, layout, packing, scheme, mode, model={**EXPERTS, **model},
        training=training, weighting=weighting, **changes,
    )  # fmt: skip


def leave_experts_idle(chunks: list[Any], model: Any, seed: int) -> None:
    """Random weights, but for the routers': whoever comes, one of the first two experts has the
    largest logit, and the others have 0."""
    from lctw_megatron.model.initialize import initialize_weights
    from lctw_megatron.model.router import routers

    initialize_weights(chunks, model, seed)
    for router in routers(chunks):
        router.weight.data[1] = -router.weight.data[0]
        router.weight.data[2:] = 0


def expert_pass(prefix: str, folder: str, case: Case, kind: str = "gpt") -> dict[str, Any]:
    from lctw_megatron.model import gpt

    fill = leave_experts_idle if case[4] == IDLE else gpt.initialize_weights
    with mock.patch.object(gpt, "initialize_weights", fill):
        found = one_pass(expert_run(prefix, folder, case, megatron={"model": kind}))
    layers = EXPERTS["num_layers"]
    assert case[4] != IDLE or found["metrics"]["router/idle_experts"] == 2 * layers
    return found


def passes(prefix: str, folder: str, cases: list[Case], kind: str) -> list[dict[str, Any]]:
    return [expert_pass(prefix, folder, case, kind) for case in cases]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_losses_gradients_and_routing_equal_one_process(
    data: str, tmp_path: Path, ranks: int, kind: str
) -> None:
    """One process has GPTModel, whatever the ranks have."""
    answers = run_distributed(passes, ranks, data, str(tmp_path), CASES[ranks], kind)
    known: dict[str, Any] = {}
    for number, case in enumerate(CASES[ranks]):
        # Neither the layout nor the micro batch changes anything.
        same = repr(case[1:5])
        if same not in known:
            known[same] = expert_pass(data, str(tmp_path), ({}, *case[1:5], BATCH))
        expected, found = known[same], answers[0][number]["metrics"]
        assert "router/balance_loss" in found
        assert found == pytest.approx(expected["metrics"], rel=1e-10, abs=1e-12), case
        gradients = gather([answer[number]["gradients"] for answer in answers])
        for name, gradient in gather([expected["gradients"]]).items():
            assert relative_error(gradients[name], gradient) < 1e-10, (case, name)


def objective_by_hand(run: RunConfig) -> dict[str, Any]:
    """The objective of model/router.py written down once more, of all positions at once, and its
    gradients: a model in evaluation mode, to which no balance is added."""
    from lctw_megatron.data.batch import IGNORE
    from lctw_megatron.data.loader import TokenLoader
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.model.router import routers
    from lctw_megatron.platform.world import initialize
    from tests.training.layouts import SEQUENCE, shards

    world = initialize(run.layout, run.seed)
    (model,) = build_model(
        run.model, run.layout, max_sequence_length=SEQUENCE, dtype=torch.float64,
        device=world.device, seed=run.seed,
    )  # fmt: skip
    loader = TokenLoader(
        run.data, seed=run.seed, global_batch_size=BATCH, micro_batch_size=BATCH, dp_rank=0,
        dp_size=1, cp_rank=0, cp_size=1, scores=False,
    )  # fmt: skip
    (batch,) = list(loader.step(0))
    loader.close()
    inputs: list[torch.Tensor] = []
    for router in routers([model]):
        router.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    losses = model.eval()(
        batch["tokens"], batch["position_ids"], batch.get("boundaries"), labels=batch["labels"]
    )
    live = (batch["labels"] != IGNORE).T.unsqueeze(-1).double()  # [s, b, 1]
    targets = live.sum(0)  # [b, 1]
    experts, k = run.model.num_moe_experts or 0, run.model.moe_router_topk
    balance = []
    for router, given in zip(routers([model]), inputs, strict=True):
        p = torch.softmax(given @ router.weight.T, -1)
        chosen = torch.nn.functional.one_hot(p.topk(k).indices, experts).sum(-2) * live
        f, mean = chosen.sum(0) / (k * targets), (p * live).sum(0) / targets
        balance.append((targets * experts * f * mean).sum() / targets.sum())
    total = losses.sum() / targets.sum() + run.model.moe_aux_loss_coeff * sum(balance)
    total.backward()
    for parameter in model.parameters():
        parameter.data.copy_(parameter.grad)
    return {
        "loss": float(losses.sum() / targets.sum()),
        "balance": float(sum(balance)) / len(balance),
        "gradients": shards([model]),
    }


def test_the_balance_is_added_once_and_is_what_its_formula_says(data: str, tmp_path: Path) -> None:
    heavy = {"moe_aux_loss_coeff": 3.0}
    run = expert_run(data, str(tmp_path), ({}, "chunk", "uniform", "frozen", heavy, 2))
    found, expected = one_pass(run), objective_by_hand(run)
    assert found["metrics"]["loss/weighted"] == pytest.approx(expected["loss"], rel=1e-12)
    assert found["metrics"]["router/balance_loss"] == pytest.approx(expected["balance"], rel=1e-12)
    gradients = gather([found["gradients"]])
    for name, gradient in gather([expected["gradients"]]).items():
        # The number of targets is divided by in float32.
        assert relative_error(gradients[name], gradient) < 1e-7, name


def test_the_balance_is_never_weighted_and_windows_leave_it_alone(
    data: str, tmp_path: Path
) -> None:
    def gradients(scheme: str, mode: str, coefficient: float) -> dict[str, Any]:
        model = {"moe_aux_loss_coeff": coefficient}
        case: Case = ({}, "chunk", scheme, mode, model, 4)
        found = one_pass(expert_run(data, str(tmp_path), case))
        return gather([found["gradients"]]) | {"metrics": found["metrics"]}

    of_balance: list[dict[str, Any]] = []
    for scheme, mode in (("uniform", "frozen"), ("sparse", "self")):
        with_it, without = (gradients(scheme, mode, c) for c in (3.0, 0.0))
        routed = [with_it.pop("metrics"), without.pop("metrics")]
        assert routed[0] == routed[1]  # it changes gradients, and nothing that is said of losses
        router = {name: value for name, value in routed[0].items() if name.startswith("router/")}
        of_balance.append({name: with_it[name] - without[name] for name in with_it} | router)
    assert of_balance[0].keys() == of_balance[1].keys()
    for name, value in of_balance[0].items():
        if name.startswith("router/"):
            assert of_balance[1][name] == value, name
        elif abs(value).max() > 1e-9:
            assert relative_error(of_balance[1][name], value) < 1e-9, name


# The trainer: distributed optimizer, clipping, checkpoints.

TRAINING = {"clip_grad": 0.5, "save_interval": 2, "keep_last": 2, "hang_minutes": 0}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 2000}
LAYOUTS: list[dict[str, Any]] = [
    {"expert": 2, **SP2},
    {"expert": 2, "pipeline": 2},
    # Each expert on two of the four data- and context-parallel ranks, which the others are sent in
    # vain when they load.
    {"expert": 2, "context": 2},
]


def trainer_run(prefix: str, folder: Path, layout: dict[str, Any], kind: str = "gpt") -> RunConfig:
    case: Case = (layout, "pack", "dense", "frozen", {}, 2)
    megatron = {"model": kind, "ddp": OVERLAP if layout else {}}
    return expert_run(prefix, str(folder), case, training=TRAINING, megatron=megatron)


def train_save_and_go_on(prefix: str, folder: str, kind: str, other: str) -> list[Any]:
    """Three steps under every layout; then a run under the first is saved after two steps, and goes
    on under each of the others, as the other kind; a copy is left for one process."""
    from lctw_megatron.training.loop import Trainer

    answers: list[Any] = [
        three_steps(trainer_run(prefix, Path(folder) / f"{number}", layout, kind))
        for number, layout in enumerate(LAYOUTS)
    ]
    saved = Path(folder) / "saved"
    trainer = Trainer(trainer_run(prefix, saved, LAYOUTS[0], kind))
    for step in range(2):
        trainer.stepper.step(step, list(trainer.loader.step(step)))
    trainer.save(2)
    trainer.close()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(saved, Path(folder) / "alone")
    dist.barrier()
    runs = [trainer_run(prefix, saved, layout, other) for layout in LAYOUTS[1:]]
    return [*answers, *map(last_step, runs)]


def last_step(run: RunConfig) -> dict[str, float]:
    """Of a run whose checkpoint is of step 2."""
    from lctw_megatron.training.loop import Trainer

    trainer = Trainer(run)
    assert trainer.first_step == 2
    try:
        return trainer.stepper.step(2, list(trainer.loader.step(2)))
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("gpt", "gpt"),
        pytest.param("hybrid", "gpt", marks=needs_hybrid),
        pytest.param("gpt", "hybrid", marks=[needs_hybrid, pytest.mark.long]),
    ],
)
def test_steps_clipping_and_checkpoints_equal_one_process(
    data: str, tmp_path: Path, kind: str, other: str
) -> None:
    """A run of one kind goes on as the other; one process has GPTModel."""
    arguments = (data, str(tmp_path), kind, other)
    answers = run_distributed(train_save_and_go_on, 4, *arguments, timeout=500)
    expected = three_steps(trainer_run(data, tmp_path / "never stopped", {}))
    weights = gather([expected["weights"]])
    assert all(metrics["grad_norm"] > 2 * TRAINING["clip_grad"] for metrics in expected["metrics"])
    for number, layout in enumerate(LAYOUTS):
        for found, right in zip(answers[0][number]["metrics"], expected["metrics"], strict=True):
            for name in ("loss/weighted", "loss/plain", "grad_norm", "router/balance_loss"):
                assert found[name] == pytest.approx(right[name], rel=1e-5), (layout, name)
        validation = answers[0][number]["validation"]
        assert validation == pytest.approx(expected["validation"], rel=1e-5), layout
        found = gather([answer[number]["weights"] for answer in answers])
        for name, weight in weights.items():
            assert relative_error(found[name], weight) < 1e-3, (layout, name)
    going_on = [*answers[0][len(LAYOUTS) :], last_step(trainer_run(data, tmp_path / "alone", {}))]
    for found in going_on:
        for name in ("loss/weighted", "grad_norm", "learning_rate", "router/largest_load"):
            assert found[name] == pytest.approx(expected["metrics"][2][name], rel=1e-5), name


def test_a_bad_number_of_ranks_is_one_line() -> None:
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.errors import InputError
    from lctw_megatron.platform.world import initialize

    with pytest.raises(InputError, match="with expert 2 = 2 ranks, but 1 were started"):
        initialize(LayoutConfig(expert=2), seed=1)
