"""The paper's published scoring of a Hugging Face Llama with random weights, to 1e-4 nats."""

import json
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from tests.scoring.processes import score
from tests.scoring.scorers import tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_llama"
TOLERANCE = 1e-4  # nats


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The golden tokens and the imported model, which has no tokenizer of its own."""
    folder = tmp_path_factory.mktemp("golden")
    import_hf(GOLDEN / "model", folder / "scorer", log=lambda line: None)
    identity = tokenizer(vocab_size=160, path="golden")
    path = folder / "scorer" / "checkpoint.json"
    manifest = json.loads(path.read_text()) | {"tokenizer": identity.model_dump(mode="json")}
    path.write_text(json.dumps(manifest))
    with np.load(GOLDEN / "scores.npz") as golden, TokenWriter(folder / "data", identity) as writer:
        for row in golden["tokens"]:
            writer.add(row)
    return ["--data", str(folder / "data"), "--checkpoint", str(folder / "scorer")]


@pytest.mark.parametrize(
    ("name", "window", "stride"), [("short_loss", 128, 96), ("long_loss", 512, 512)]
)
def test_windows_give_the_published_losses(
    name: str, window: int, stride: int, arguments: list[str], tmp_path: Path
) -> None:
    windows = ["--window", str(window), "--stride", str(stride), "--score-first-window"]
    outcome = score(tmp_path / "output", [*arguments, *windows, "--name", name])
    assert outcome.status == 0, outcome.output
    sidecar = Sidecar(TokenDataset(arguments[1]), name)
    with np.load(GOLDEN / "scores.npz") as golden:
        for row, expected in enumerate(golden[name]):
            values = sidecar[row]
            assert np.isnan(values[0])
            np.testing.assert_allclose(values[1:], expected, rtol=0, atol=TOLERANCE)
