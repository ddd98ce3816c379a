"""A program: train on a CPU once with all patches of platform/cpu.py, then once without each.

    python -m tests.platform.cpu_workout FOLDER

Prints a JSON object: the patch that was left out ("nothing": none) -> what went wrong, or null.
"""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

# Kept before anything of ours is imported.
REAL_RANDOM = {
    name: getattr(megatron_random, name) for name in ("_get_cuda_rng_state", "_set_cuda_rng_state")
}

from lctw_megatron.platform import cpu, torch_adam, world  # noqa: E402
from tests.training.layouts import make_data, make_run  # noqa: E402

COMPLAINTS = logging.getLogger("megatron.core.tensor_parallel.random")


class _Complaints(logging.Handler):
    """Makes an error of a warning that would be written for every layer."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


class _TwoRanks:
    """Looks like a context-parallel group."""

    rank, size = staticmethod(lambda: 0), staticmethod(lambda: 2)


def workout(prefix: str, folder: Path) -> None:
    """What training does with megatron-core, on one rank."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.exchange_utils import _get_empty_tensor_for_exchange
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    from lctw_megatron.training import loop

    run = make_run(
        prefix, str(folder), {"recompute": "full"}, "chunk", "dense", "self",
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1, "num_moe_experts": 2},
        training={"steps": 2, "save_interval": 1, "async_save": True},
    )  # fmt: skip
    trainer = loop.Trainer(run)
    try:
        trainer.stepper.step(0, list(trainer.loader.step(0)))
        trainer.save(1)
        trainer.writer.finish()
    finally:
        trainer.close()
    resumed = loop.Trainer(run)
    resumed.stepper.step(1, list(resumed.loader.step(1)))
    resumed.close()
    assert resumed.first_step == 1
    counts = {
        float(state["step"])
        for part in resumed.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    }
    assert counts == {2.0}, f"the optimizer has counted {counts} steps"
    part = torch.zeros(2)
    shards = {("part",): ShardedTensor.from_rank_offsets("part", part)}
    assert _get_empty_tensor_for_exchange(("part",), shards, {}, {})[0] is part
    others = {("part",): ShardedTensor.from_rank_offsets("part", part).without_data()}
    assert _get_empty_tensor_for_exchange(("part",), {}, others, {})[0].shape == part.shape
    assert get_pos_emb_on_this_cp_rank(torch.zeros(8, 1, 1, 2), 0, _TwoRanks()).shape[0] == 4

    def draw(inside: bool) -> tuple[Any, Any]:
        tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        fork = tensor_parallel.get_cuda_rng_tracker().fork()
        with fork if inside else nullcontext():
            first = torch.rand(3)
        return first.tolist(), torch.rand(3).tolist()

    assert draw(True) == draw(True), "a seed does not fix the tensor-parallel random numbers"
    assert draw(True)[1] == draw(False)[0], "tensor-parallel random numbers disturb the others"


def patches() -> dict[str, Callable[[], Any]]:
    """Name -> a context without that patch."""
    found: dict[str, Callable[[], Any]] = {}
    for view, prefix in ((cpu._VIEW, "torch"), (cpu._VIEW.cuda, "torch.cuda")):
        for name in vars(view):
            if not name.startswith("__"):
                found[f"{prefix}.{name}"] = lambda view=view, name=name: _without(view, name)
    for name, real in REAL_RANDOM.items():
        found[name] = lambda name=name, real=real: mock.patch.object(megatron_random, name, real)
    found["torch.Tensor.cuda"] = lambda: _without(torch.Tensor, "cuda")
    found["ShardedTensor.init_data"] = lambda: mock.patch.object(
        ShardedTensor.init_data, "__defaults__", (torch.empty,)
    )
    found["pinned memory"] = _with_pinned_memory
    found["optimizer_construction"] = lambda: mock.patch(
        "lctw_megatron.training.optimizer.optimizer_construction", nullcontext
    )
    found["prepare_torch_adam"] = lambda: mock.patch(
        "lctw_megatron.training.optimizer.prepare_torch_adam", lambda optimizer: None
    )
    found["prepare_torch_adam: loading"] = lambda: mock.patch.object(
        torch_adam, "_load_state_dict", lambda self, *args: type(self).load_state_dict(self, *args)
    )
    found["complaint filter"] = lambda: mock.patch.object(COMPLAINTS, "filters", [])
    return found


@contextmanager
def _without(owner: Any, name: str) -> Iterator[None]:
    value = vars(owner)[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


@contextmanager
def _with_pinned_memory() -> Iterator[None]:
    """torch.tensor reads "cuda" as the CPU, but pins memory when asked to."""

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        made = mine(*args, **kwargs)
        return made.pin_memory() if pin_memory else made

    mine = cpu._VIEW.tensor
    with mock.patch.object(cpu._VIEW, "tensor", tensor):
        yield


def outcome(prefix: str, folder: Path, without: Callable[[], Any]) -> str | None:
    # Patched by the imports above: training must not put back what is left out.
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(world, "patch_megatron", lambda: None))
        stack.enter_context(mock.patch.object(COMPLAINTS, "handlers", [_Complaints()]))
        # Made once for all.
        stack.enter_context(mock.patch.object(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None))
        stack.enter_context(without())
        try:
            workout(prefix, folder)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return None


def main(folder: Path) -> None:
    import lctw_megatron.training.loop  # noqa: F401  imports and patches all of megatron-core

    prefix = make_data(folder)
    cases: dict[str, Callable[[], Any]] = {"nothing": nullcontext, **patches()}
    outcomes = {
        name: outcome(prefix, folder / str(number), without)
        for number, (name, without) in enumerate(cases.items())
    }
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
