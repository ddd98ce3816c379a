"""How much memory a rank may take."""

import platform
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.world import default_device

CGROUPS = Path("/sys/fs/cgroup")
_USABLE = {"cuda": 0.9, "cpu": 0.5}
"""A share is left free. On a GPU for the CUDA context, buffers of communication and fragmentation;
on a host for the system, file caches, Python and kernels that are not fused."""


def usable_memory(ranks: int, gpu_gib: float | None = None) -> int:
    """Bytes that each of ``ranks`` ranks may take: on GPUs like this machine's, or of ``gpu_gib``
    GiB; without any, all of them on this host."""
    if gpu_gib is not None:
        return int(gpu_gib * 2**30 * _USABLE["cuda"])
    if capabilities().gpu:
        return _of_device(default_device())
    return _of_device(torch.device("cpu")) // ranks


def least_usable_memory(device: torch.device) -> int:
    """Bytes that every rank may take, so that all ranks can decide alike: the least that one of
    them has. A collective call."""
    mine = (platform.node(), str(device), _of_device(device))
    everyones = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    places = [place for *place, _ in everyones]
    return min(memory // places.count(place) for *place, memory in everyones)


def _of_device(device: torch.device) -> int:
    whole = host_memory()
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
    return int(whole * _USABLE[device.type])


def host_memory() -> int:
    """Bytes of this host's memory that this process may use: under SLURM or in a container less
    than there are."""
    return min([psutil.virtual_memory().total, *_limits()])


def _limits() -> list[int]:
    """Of this process's control group and those around it, in either version's files."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return limits
