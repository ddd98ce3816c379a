"""What all tests share."""

import os

import pytest
from hypothesis import settings

# The machines that run these tests are small and shared: a slow example is no failure.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Workers (-n 2 --dist loadgroup) take whole files, whose tests share fixtures; there is one
    # SLURM at a time.
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        name = item.nodeid.partition("::")[0]
        group = "slurm" if name.startswith("tests/slurm/") else name
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_configure(config: pytest.Config) -> None:
    # The other tests are of the CPU's path, over gloo, also where GPUs are.
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
