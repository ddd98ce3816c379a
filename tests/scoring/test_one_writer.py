"""One run of a whole sidecar, or runs of different shards; the dead stand in nobody's way."""

import json
from pathlib import Path

import pytest

from lctw_megatron import ownership
from lctw_megatron.errors import InputError
from lctw_megatron.scoring.one_writer import sole_worker
from lctw_megatron.work_folder import make_work_folder
from tests.scoring.processes import score
from tests.scoring.scene import Scene, sidecar_bytes


@pytest.mark.parametrize(
    ("first", "second", "enters"),
    [
        (None, None, False),
        ((1, 3), (1, 3), False),
        ((1, 3), (2, 3), True),
        ((1, 3), None, False),
        (None, (1, 3), False),
    ],
)
def test_a_whole_run_is_alone_and_shards_only_meet_their_own_kind(
    tmp_path: Path,
    first: tuple[int, int] | None,
    second: tuple[int, int] | None,
    enters: bool,
) -> None:
    folder = tmp_path / "corpus.short_loss.shards"
    with sole_worker(folder, first):
        if enters:
            with sole_worker(folder, second):
                pass
        else:
            with pytest.raises(InputError, match=r"corpus.short_loss.shards.*being written by"):
                sole_worker(folder, second).__enter__()
        assert folder.exists()
    with sole_worker(folder, second):
        pass
    assert not folder.exists()


@pytest.mark.parametrize("name", ["lock", "00001-of-00003.lock"])
@pytest.mark.parametrize("who", [None, (1, 3), (2, 3)])
def test_what_a_killed_run_has_left_blocks_nobody(
    tmp_path: Path, name: str, who: tuple[int, int] | None
) -> None:
    folder = tmp_path / "shards"
    make_work_folder(folder)
    dead = {"format": ownership.FORMAT, "host": ownership.socket.gethostname(), "process": 1}
    (folder / name).write_text(json.dumps(dead | {"started": 0.0}))
    with sole_worker(folder, who):
        pass


def test_the_command_refuses_beside_a_living_run_and_touches_nothing(copy: Scene) -> None:
    output = copy.folder / "output"
    folder = Path(f"{copy.prefix}.short_loss.shards")
    with sole_worker(folder, (0, 2)):
        outcome = score(output, copy.arguments)
        assert outcome.status == 2 and "shard 00000-of-00002: is being written" in outcome.output
        assert score(output, [*copy.arguments, "--shard", "1/2"]).status == 0
    assert score(output, [*copy.arguments, "--shard", "0/2"]).status == 0
    with sole_worker(folder, None):
        outcome = score(output, [*copy.arguments, "--merge"])
        assert outcome.status == 2 and "is being written by process" in outcome.output
    assert score(output, [*copy.arguments, "--merge"]).status == 0
    assert len(sidecar_bytes(copy.prefix)) == 3 and not folder.exists()
