"""The wrapped forward step under megatron-core's own schedule, beside tools/train.py's step."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.errors import InputError
from lctw_megatron.plugin.forward_step import weighted_forward_step
from lctw_megatron.plugin.loss_mask import DEAD
from lctw_megatron.weighting import compute_weights, parse_weighting
from tests.distributed import run_distributed
from tests.training.layouts import (
    SEQUENCE,
    gather,
    make_data,
    make_run,
    one_pass,
    relative_error,
    shards,
)  # fmt: skip

LAYOUTS: list[dict[str, Any]] = [{"context": 2}, {}, {"pipeline": 2}]  # the second is DP2


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: Any = None) -> Any:
    """As pretrain_gpt.py's, in the precision of the losses."""
    total = torch.sum(output_tensor.view(-1) * loss_mask.view(-1))
    tokens = loss_mask.sum().clone().detach().to(torch.int)
    assert set(loss_mask.unique().tolist()) <= {0.0, 1.0}
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens])}


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
    """As pretrain_gpt.py's; a batch holds what its get_batch gives."""
    tokens, labels, loss_mask, position_ids = next(data_iterator)
    losses = model(tokens, position_ids, None, labels=labels)
    return losses, partial(loss_func, loss_mask, model=model)


def plugin_pass(run: RunConfig) -> dict[str, Any]:
    """What layouts.one_pass does, by the plug-in: the reports' means and this rank's gradients."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )  # fmt: skip
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from lctw_megatron.data.loader import TokenLoader
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize

    world = initialize(run.layout, run.seed)
    (chunk,) = build_model(
        run.model, run.layout, max_sequence_length=SEQUENCE, dtype=torch.float64,
        device=world.device, seed=run.seed, packed=False,
    )  # fmt: skip
    config = chunk.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), chunk)
    config.finalize_model_grads_func = finalize_model_grads
    loader = TokenLoader(
        run.data, scores=True, seed=run.seed, global_batch_size=8, micro_batch_size=2,
        dp_rank=world.data_rank, dp_size=world.data_size, cp_rank=world.context_rank,
        cp_size=run.layout.context,
    )  # fmt: skip
    batches = [
        (
            batch["tokens"], batch["labels"],
            batch["short_loss"].where(batch["loss_mask"] != 0, DEAD), batch["position_ids"],
        )
        for batch in loader.step(0)
    ]  # fmt: skip
    loader.close()
    wrapped.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=weighted_forward_step(forward_step, run.weighting),
        data_iterator=iter(batches), model=[wrapped], num_microbatches=len(batches),
        seq_length=SEQUENCE, micro_batch_size=2, forward_only=False,
    )  # fmt: skip
    means = {}
    if parallel_state.is_pipeline_last_stage():
        for name in reports[0]:
            total = torch.stack([report[name].double() for report in reports]).sum(0)
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(True))
            means[name] = float(total[0] / total[1])
    for parameter in chunk.parameters():
        parameter.data.copy_(parameter.main_grad)
    return {"means": means, "gradients": shards([chunk])}


def all_layouts(prefix: str, folder: str, schemes: list[str]) -> dict[Any, Any]:
    return {
        (scheme, number): plugin_pass(
            make_run(prefix, folder, layout, "chunk", scheme, "frozen", data=data(prefix))
        )
        for scheme in schemes
        for number, layout in enumerate(LAYOUTS)
    }


def data(prefix: str) -> dict[str, Any]:
    """Kept tails: labels that are no targets, which may leave a context rank without any."""
    return {"train": [{"prefix": prefix}], "sequence_length": SEQUENCE, "tails": "keep"}


def test_losses_and_gradients_are_those_of_tools_train_in_one_process_under_cp_dp_and_pp(tmp_path):
    prefix, schemes = make_data(tmp_path), ["dense", "sparse"]
    ranks = run_distributed(all_layouts, 2, prefix, str(tmp_path), schemes)
    for scheme in schemes:
        run = make_run(prefix, str(tmp_path), {}, "chunk", scheme, "frozen", data=data(prefix))
        alone = one_pass(run)
        metrics, gradients = alone["metrics"], gather([alone["gradients"]])
        for number, layout in enumerate(LAYOUTS):
            outcomes = [rank[scheme, number] for rank in ranks]
            means = outcomes[-1]["means"]
            assert means["lm loss"] == pytest.approx(metrics["loss/weighted"], rel=1e-10), layout
            assert means["unweighted lm loss"] == pytest.approx(metrics["loss/plain"], rel=1e-10)
            share = metrics["targets/unscored"] / metrics["targets/all"]
            assert means["unscored"] == pytest.approx(share, rel=1e-6)
            found = gather([outcome["gradients"] for outcome in outcomes])
            for name, expected in gradients.items():
                assert relative_error(found[name], expected) < 1e-10, f"{scheme} {layout} {name}"


DENSE = {"scheme": "dense", "interpolation": 0.25}


def tiny_model(training: bool = True, **config: Any) -> Any:
    """Looks like a model of megatron-core to the plug-in; its losses are 1, 2, 3, 4, infinity."""
    values = {"calculate_per_token_loss": True, "mtp_num_layers": None} | config
    return SimpleNamespace(
        config=SimpleNamespace(**values),
        training=training,
        pg_collection=SimpleNamespace(cp=None),
        losses=torch.tensor([[1.0, 2.0, 3.0, 4.0, math.inf]]),
    )


def one_loss(model: Any, mask: list[float], step: Any = None, weighting: Any = None) -> Any:
    """What the loss function of one micro batch gives for a loss_mask."""

    def plain_step(data_iterator: Any, model: Any) -> Any:
        return model.losses, partial(loss_func, next(data_iterator))

    wrapped = weighted_forward_step(step or plain_step, weighting or DENSE)
    losses, function = wrapped(iter([torch.tensor([mask])]), model)
    return function(losses)


MASK = [math.nan, 2.5, 3.25, 9.0, DEAD]


def test_the_objective_is_the_weighted_sum_over_live_labels_whatever_a_dead_one_holds():
    total, tokens, report = one_loss(tiny_model(), MASK)
    long_loss, short_loss = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([MASK[:4]])
    weights = compute_weights(parse_weighting(DENSE), long_loss, short_loss)
    assert (int(tokens), float(total)) == (4, pytest.approx(float((weights * long_loss).sum())))
    assert report["unweighted lm loss"].tolist() == [10, 4]
    assert report["unscored"].tolist() == [1, 4]


def test_a_sixty_fourth_of_the_weights_is_a_sixty_fourth_of_the_loss_and_no_fewer_tokens():
    weighting = {"scheme": "custom", "function": "tests.plugin.test_forward_step:light"}
    total, tokens, _ = one_loss(tiny_model(), MASK, weighting=weighting)
    assert (int(tokens), float(total)) == (4, 10 / 64)


def light(long_loss: torch.Tensor, short_loss: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.full_like(long_loss, 1 / 64)


def test_evaluation_weighs_nothing():
    total, tokens, report = one_loss(tiny_model(training=False), MASK)
    assert (int(tokens), float(total), list(report)) == (4, 10, ["lm loss"])


@pytest.mark.parametrize(
    "config, named",
    [
        ({"calculate_per_token_loss": False}, "set --calculate-per-token-loss"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is 1"),
        ({"hybrid_context_parallel": True}, "hybrid_context_parallel is on"),
    ],
)
def test_settings_under_which_the_loss_would_be_wrong_are_refused(config, named):
    with pytest.raises(InputError, match=named):
        one_loss(tiny_model(**config), MASK)


def test_a_mask_without_short_losses_is_refused():
    for mask in ([1.0] * 5, [1.0, 1, 1, 1, 0], [0.0] * 5):
        with pytest.raises(
            InputError, match="only 0 and 1, but .* short losses; build .* of Short"
        ):
            one_loss(tiny_model(), mask)


def test_schemes_without_short_losses_take_the_masks_of_gpt_dataset():
    weighting = {"scheme": "eslm", "keep_fraction": 0.5}
    total, tokens, report = one_loss(tiny_model(), [1.0, 1, 1, 0, 0], weighting=weighting)
    assert (int(tokens), float(total)) == (3, 3 * 3.0)  # one of three kept: the loss 3
    assert report["unscored"].tolist() == [0, 3]
    with pytest.raises(
        InputError, match="short losses, but .* only 0 and 1; build the datasets of GPT"
    ):
        one_loss(tiny_model(), MASK, weighting=weighting)


def test_forward_steps_that_cannot_be_wrapped_are_refused():
    def without_mask(data_iterator: Any, model: Any) -> Any:
        return model.losses, lambda losses: losses.sum()

    def two_values(data_iterator: Any, model: Any) -> Any:
        return model.losses, partial(lambda mask, losses: (losses.sum(), {}), next(data_iterator))

    def unnamed(*args: Any) -> Any:
        return forward_step(*args)

    with pytest.raises(InputError, match=r"unnamed\(\*args: Any\) -> Any has no parameter `model`"):
        weighted_forward_step(unnamed, DENSE)
    with pytest.raises(InputError, match="expected functools.partial"):
        one_loss(tiny_model(), MASK, without_mask)
    with pytest.raises(InputError, match="returned 2 values, expected three"):
        one_loss(tiny_model(), MASK, two_values)
    with pytest.raises(InputError, match="score the data with tools/score.py"):
        weighted_forward_step(forward_step, {**DENSE, "mode": "self", "window": 4, "stride": 2})


@pytest.fixture
def micro_batches_of_two():
    init_num_microbatches_calculator(0, None, 4, 2, 1)
    yield
    unset_num_microbatches_calculator()


@pytest.mark.parametrize("weighting", [DENSE, {"scheme": "eslm", "keep_fraction": 0.5}])
def test_sequences_that_are_joined_to_one_row_are_refused(micro_batches_of_two, weighting):
    mask = MASK if weighting is DENSE else [1.0, 1, 1, 1, 0]
    with pytest.raises(InputError, match="2 sequences, but their losses are 1 row.* of 5: joined"):
        one_loss(tiny_model(), mask, weighting=weighting)
    one_loss(tiny_model(training=False), mask, weighting=weighting)  # which weighs nothing
