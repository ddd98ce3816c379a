"""Tests that need a GPU: `make test-gpu`. Without one they are skipped, and say so."""

from pathlib import Path

import pytest

from lctw_megatron.platform.capabilities import capabilities
from tests.gpu.runs import make_data

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = capabilities()
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        needed = item.get_closest_marker("gpus")
        number = needed.args[0] if needed else 1
        if here.gpus < number:
            reason = f"needs {number} GPU(s), torch sees {here.gpus} (none without -m gpu)"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("engine") and here.transformer_engine is None:
            why = here.transformer_engine_error or "it is not installed"
            item.add_marker(pytest.mark.skip(reason=f"needs TransformerEngine: {why}"))


def pytest_report_header() -> str:
    return capabilities().line()


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape of every layout would be compiled anew; that is another test's subject."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
