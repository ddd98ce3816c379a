"""kill -9 at any moment: what is finished stays, what is half done is never taken for finished."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scoring.processes import TIMEOUT, Ranks, run_score, score
from tests.scoring.scene import EXTENSIONS, Scene, sidecar_bytes
from tests.scoring.scorers import mixed_lengths, write_corpus

SHARDS = 25


def run_score_until(step: int, arguments: list[str]) -> None:
    """tools/score.py, killed just before its ``step``-th change to the file system that lasts."""
    changes = 0

    def dying(event: str, details: tuple[object, ...]) -> None:
        nonlocal changes
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            changes += 1
            if changes == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(dying)
    run_score(arguments)


def assert_nothing_is_half_done(prefix: Path, reference: dict[str, bytes]) -> bool:
    """A sidecar that says that it is finished is the right one. Returns whether it is there."""
    finished = Path(f"{prefix}.short_loss.json").exists()
    if finished:
        assert sidecar_bytes(prefix) == reference
    return finished


def test_killed_before_every_change_of_the_merge(scene: Scene, copy: Scene, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for number in range(3):
        assert score(output, [*copy.arguments, "--shard", f"{number}/3"]).status == 0
    state, work = tmp_path / "state", tmp_path / "work"
    state.mkdir()
    for path in tmp_path.glob("corpus*"):
        path.rename(state / path.name)
    arguments = ["--data", str(work / "corpus"), *copy.arguments[2:]]
    for step in range(1, 100):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(state, work)
        outcome = Ranks(output, 0, run_score_until, step, arguments).join()
        if outcome.status == 0:
            break
        assert outcome.status == -signal.SIGKILL, outcome.output
        assert_nothing_is_half_done(work / "corpus", scene.reference)
        outcome = score(output, arguments)
        assert outcome.status == 0, outcome.output
        assert "score:" not in outcome.output  # no shard was lost
        assert sidecar_bytes(work / "corpus") == scene.reference
        # No leftovers: the token dataset and the sidecar.
        assert len(list(work.iterdir())) == 2 * len(EXTENSIONS)
    # three renames and a mark, the folder and the shards in it
    assert step >= 8, "the merge was not killed often enough: which events does it raise now?"


def test_killed_before_every_change_of_the_shards(scene: Scene, copy: Scene) -> None:
    # Without going back: each run goes on from what the last one left.
    output = copy.folder / "output"
    arguments = [*copy.arguments, "--shards", "3"]
    for step in range(1, 100):
        outcome = Ranks(output, 0, run_score_until, step, arguments).join()
        if outcome.status == 0:
            break
        assert outcome.status == -signal.SIGKILL, outcome.output
        assert_nothing_is_half_done(copy.prefix, scene.reference)
    assert step >= 3
    assert sidecar_bytes(copy.prefix) == scene.reference


def kill_and_start_again(scene: Scene, ranks: int, moments: list[float | int], seed: int) -> None:
    """Start, kill -9 a random rank, and start again; in the end finish.

    moments: when, as a share of an undisturbed run's time (float), or when so many shards are
    finished (int).
    """
    # One window a forward, so that scoring takes most of the time that a run takes.
    prefix, output = scene.folder / "corpus", scene.folder / "output"
    write_corpus(prefix, mixed_lengths(400, seed=1), add_bos=True)
    arguments = [*scene.arguments, "--tokens-per-forward", "64"]
    started = time.monotonic()
    outcome = score(output, [*arguments, "--name", "undisturbed"], ranks)
    duration = time.monotonic() - started
    assert outcome.status == 0, outcome.output
    reference = sidecar_bytes(prefix, "undisturbed")
    draw = random.Random(seed)
    finished, seen = 0, []
    folder = Path(f"{prefix}.short_loss.shards")
    for moment in moments:
        run = Ranks(output, ranks, run_score, [*arguments, "--shards", str(SHARDS)])
        if isinstance(moment, float):
            time.sleep(moment * duration)
        else:
            wait_for(lambda wanted=moment: len(list(folder.glob("*.losses"))) >= wanted)
        run.kill(draw.randrange(ranks))
        seen.append(len(list(folder.glob("*.losses"))))
        if assert_nothing_is_half_done(prefix, reference):  # done before the shot: begin anew
            finished += 1
            for end in EXTENSIONS:
                Path(f"{prefix}.short_loss{end}").unlink()
            shutil.rmtree(folder, ignore_errors=True)
    outcome = score(output, [*arguments, "--shards", str(SHARDS)], ranks)
    assert outcome.status == 0, outcome.output
    assert sidecar_bytes(prefix) == reference
    print(f"{len(seen)} kills, {finished} too late; finished shards after each: {seen}")
    assert finished < len(seen)
    assert any(0 < shards < SHARDS for shards in seen), seen


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.001)


def test_three_kills_of_random_ranks_change_no_byte(copy: Scene) -> None:
    kill_and_start_again(copy, ranks=2, moments=[1, 11, 19], seed=3)


@pytest.mark.long
def test_twenty_kills_of_random_ranks_change_no_byte(copy: Scene) -> None:
    draw = random.Random(20)
    kill_and_start_again(copy, ranks=4, moments=[draw.uniform(0.1, 0.9) for _ in range(20)], seed=4)


def test_a_shard_cut_short_by_the_file_system_is_scored_again(scene: Scene, copy: Scene) -> None:
    output = copy.folder / "output"
    for number in range(2):
        assert score(output, [*copy.arguments, "--shard", f"{number}/2"]).status == 0
    (path,) = Path(f"{copy.prefix}.short_loss.shards").glob("00001*")
    path.write_bytes(path.read_bytes()[:-100])
    outcome = score(output, [*copy.arguments, "--merge"])
    assert outcome.status == 2
    assert "00001-of-00002.losses: damaged" in outcome.output
    outcome = score(output, copy.arguments)
    assert outcome.status == 0
    assert "1 of 2 shards finished before" in outcome.output
    assert sidecar_bytes(copy.prefix) == scene.reference


def test_a_truncated_sidecar_is_made_again(scene: Scene, copy: Scene) -> None:
    output = copy.folder / "output"
    for end in EXTENSIONS:
        Path(f"{copy.prefix}.short_loss{end}").write_bytes(scene.reference[end])
    manifest = Path(f"{copy.prefix}.short_loss.json")
    assert json.loads(manifest.read_text())["scored"] > 0
    outcome = score(output, copy.arguments)
    assert "finished before" in outcome.output
    data = Path(f"{copy.prefix}.short_loss.bin")
    data.write_bytes(data.read_bytes()[:-4])
    outcome = score(output, copy.arguments)
    assert outcome.status == 0
    assert "made again" in outcome.output
    assert sidecar_bytes(copy.prefix) == scene.reference
