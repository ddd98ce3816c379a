"""What all tests share."""

import logging
import os

import pytest
from hypothesis import settings

# The machines that run these tests are small and shared: a slow example is no failure.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# A library's handler may hold the standard error of a test that is over: what it cannot write there
# is no part of what the next test has to say.
logging.raiseExceptions = False


def pytest_configure(config: pytest.Config) -> None:
    # The other tests are of the CPU's path, over gloo, also where GPUs are.
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
