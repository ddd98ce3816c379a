"""Fixtures of these tests."""

import pytest


@pytest.fixture
def process_group() -> None:
    """This process is the only rank: Megatron's dataset builder asks its group."""
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.platform.world import initialize

    initialize(LayoutConfig(), seed=0)
