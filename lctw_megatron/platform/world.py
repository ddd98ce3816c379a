"""Process groups: who this process is among the ranks, and on which device it works."""

import datetime
import io
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.errors import InputError, exit_status
from lctw_megatron.platform.capabilities import capabilities, local_gpu
from lctw_megatron.platform.cpu import patch_megatron
from lctw_megatron.platform.gpu import fuse_small_operations
from lctw_megatron.platform.mixed_products import fuse_weight_gradients

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    data_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def progress_stream(self) -> TextIO:
        """Where this rank says how far it is: standard error, of the first only."""
        return sys.stderr if self.is_first else _Nowhere()


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


def default_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if gpus := capabilities().gpus:
        return torch.device("cuda", local_gpu(gpus))
    return torch.device("cpu")


def started_together() -> bool:
    """Whether this process is one of several ranks that a launcher started, or alone.

    InputError for tasks of a plain srun, which would all take themselves for the only one, and for
    a rank that is not told of the others and has not joined them.
    """
    if "RANK" in os.environ:
        needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in os.environ]
        if missing and not dist.is_initialized():
            raise InputError(
                f"RANK is set, but {', '.join(missing)} not; export them too, or unset RANK to run "
                "alone"
            )
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        raise InputError(
            f"srun started {tasks} tasks without RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT; export them as the scripts of tools/launch.py do, or use torchrun"
        )
    return False


def started_ranks() -> int:
    """How many ranks there are, before they have joined."""
    return int(os.environ["WORLD_SIZE"]) if started_together() else 1


def initialize(layout: LayoutConfig, seed: int, timeout_minutes: float = 30) -> World:
    """Join the ranks started by torchrun or srun (or be alone) and form megatron-core's groups.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them the world has one rank. Works
    again on the same ranks: groups of the same layout are kept, as NCCL takes a second for each.
    Raises InputError if the ranks do not fit the layout.
    """
    patch_megatron()
    fuse_small_operations()
    fuse_weight_gradients()
    from megatron.core import parallel_state, tensor_parallel

    if layout.tensor > 1 or layout.context > 1:
        # Before Blackwell the order of the host lets communication overlap only on one connection
        # (Megatron-LM's arguments demand it). CUDA reads it when it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        # The device type keeps object collectives and barriers of CPU tensors on gloo.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if started_together():
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    size = dist.get_world_size()
    if size % layout.fewest_ranks:
        experts = f" with expert {layout.expert}" if layout.expert > 1 else ""
        raise InputError(
            f"layout: tensor {layout.tensor} x pipeline {layout.pipeline} x context "
            f"{layout.context}{experts} = {layout.fewest_ranks} ranks, but {size} were started; "
            f"start a multiple of {layout.fewest_ranks}"
        )
    sizes = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
        "distributed_timeout_minutes": timeout_minutes,
    }
    if not (parallel_state.is_initialized() and sizes == _FORMED):
        if parallel_state.is_initialized():
            _leave_groups()
        parallel_state.initialize_model_parallel(**sizes)
        _FORMED.clear()
        _FORMED.update(sizes)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return World(
        rank=dist.get_rank(),
        size=size,
        device=device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def join(layout: LayoutConfig) -> bool:
    """Join the other ranks, if a launcher started several, so that the first one can decide for
    them. Alone, nothing is done: what is finished needs no megatron-core. Whether this rank is the
    first."""
    return initialize(layout, seed=0).is_first if started_together() else True


_FORMED: dict[str, Any] = {}
"""What megatron-core's groups of this process were formed with."""


def _leave_groups() -> None:
    """Forget megatron-core's groups and end their threads.

    Its own `destroy_model_parallel` only forgets them, and torch keeps what is not destroyed: three
    threads for each gloo group, about forty for one layout.
    """
    from megatron.core import parallel_state

    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # None stands for the default group, of all ranks
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def first_rank_decides(
    decide: Callable[[], Result], group: dist.ProcessGroup | None = None
) -> Result:
    """What ``decide`` gives on the first rank, on all ranks, as a pickle: what is on a shared file
    system they need not see at the same moment. All ranks call it; without groups there is one.

    If it fails because of the user's input or the disk, the others leave quietly with its status.
    group: whose timeout bounds the waiting; None: the default group's.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide()
    answer: list[Any] = [None, 0]
    error: InputError | OSError | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except (InputError, OSError) as refusal:
            error, answer[1] = refusal, exit_status(refusal)
    dist.broadcast_object_list(answer, 0, group)
    if answer[1]:
        raise error or SystemExit(answer[1])
    return answer[0]


def on_first_rank(action: Callable[[], Result]) -> Result | None:
    """``first_rank_decides`` for what cannot travel: what ``action`` gives on the first rank, None
    on the others."""
    results: list[Result] = []
    first_rank_decides(lambda: results.append(action()))
    return results[0] if results else None


def shut_down() -> None:
    """Leave the groups, so that a finished rank does not keep the others waiting."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
