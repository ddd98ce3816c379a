"""One random scorer and what an undisturbed run makes with it, for all tests of this folder."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.scoring.processes import Ranks, score
from tests.scoring.scorers import MODEL, mixed_lengths, write_checkpoint, write_corpus

EXTENSIONS = (".bin", ".idx", ".json")


def sidecar_bytes(prefix: Path | str, name: str = "short_loss") -> dict[str, bytes]:
    return {end: Path(f"{prefix}.{name}{end}").read_bytes() for end in EXTENSIONS}


class Scene(NamedTuple):
    """A corpus, a scorer, and the sidecar of an undisturbed run of one process."""

    folder: Path
    prefix: Path
    checkpoint: Path

    @property
    def arguments(self) -> list[str]:
        return ["--data", str(self.prefix), "--checkpoint", str(self.checkpoint), *WINDOWS]

    @property
    def reference(self) -> dict[str, bytes]:
        return sidecar_bytes(self.prefix)


WINDOWS = ["--window", "64", "--stride", "32", "--tokens-per-forward", "256"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    outcome = Ranks(folder / "output", 1, write_checkpoint, folder / "checkpoints", 1, MODEL).join()
    assert outcome.status == 0, outcome.output
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scorer of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("other")
    outcome = Ranks(folder / "output", 1, write_checkpoint, folder, 2, MODEL).join()
    assert outcome.status == 0, outcome.output
    return folder


@pytest.fixture(scope="session")
def scene(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    write_corpus(folder / "corpus", mixed_lengths(250, seed=0), add_bos=True)
    scene = Scene(folder, folder / "corpus", checkpoint)
    outcome = score(folder / "output", scene.arguments)
    assert outcome.status == 0, outcome.output
    return scene


@pytest.fixture
def copy(scene: Scene, tmp_path: Path) -> Scene:
    """The same corpus, not yet scored."""
    for end in EXTENSIONS:
        (tmp_path / f"corpus{end}").write_bytes(Path(f"{scene.prefix}{end}").read_bytes())
    return scene._replace(folder=tmp_path, prefix=tmp_path / "corpus")
