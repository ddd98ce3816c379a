"""Runs of preprocess() that end early, and what the next one finds."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from lctw_megatron.data.preprocessing import corpus, shard_pool
from lctw_megatron.data.preprocessing import preprocess as module
from lctw_megatron.data.preprocessing.preprocess import preprocess
from lctw_megatron.errors import InputError
from lctw_megatron.work_folder import MARK
from tests.data.preprocessing.test_preprocess import (
    TEXTS,
    changed,
    config,
    in_process,
    small_shards,
    stored_texts,
)

__all__ = ["config", "in_process", "small_shards"]


@contextlib.contextmanager
def broken_after(monkeypatch, count, error, worth_keeping=0):
    """Tokenising raises ``error`` from shard number ``count`` on."""
    made = []
    tokenise = shard_pool.tokenise_shard

    def some(shard, *arguments):
        if len(made) == count:
            raise error
        made.append(shard)
        return tokenise(shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard_pool, "tokenise_shard", some)
        patch.setattr(module, "_WORTH_KEEPING_SECONDS", worth_keeping)
        yield made


def test_finished_shards_of_a_failed_run_are_taken_by_the_next(config, in_process, monkeypatch):
    work = config.output_prefix + ".shards"
    with (
        broken_after(monkeypatch, 3, InputError("a broken line")),
        pytest.raises(InputError, match="a broken line; the next run takes what is finished in"),
    ):
        preprocess(config)
    assert sum(name not in ("lock", MARK) for name in os.listdir(work)) == 3
    total = len(corpus.plan_shards(corpus.find_files(config.inputs, "/o")))
    with broken_after(monkeypatch, 99, None) as made:
        preprocess(config)
    assert len(made) == total - 3
    assert stored_texts(config) == TEXTS
    assert not os.path.exists(work)


def test_shards_of_other_settings_are_not_taken_and_stay_for_who_goes_back(
    config, hf_folder, in_process, monkeypatch, capsys
):
    with broken_after(monkeypatch, 3, InputError("stop")), pytest.raises(InputError):
        preprocess(config)
    work = config.output_prefix + ".shards"
    os.makedirs(os.path.join(work, ".half-written.tmp"))
    other = changed(config, tokenizer=str(hf_folder))
    with broken_after(monkeypatch, 0, InputError("stop")), pytest.raises(InputError):
        preprocess(other)
    assert f"{work}: 3 shards of other settings or text stay" in capsys.readouterr().out
    assert len([name for name in os.listdir(work) if name not in ("lock", MARK)]) == 3
    preprocess(other)
    assert stored_texts(other) == TEXTS and not os.path.exists(work)


def test_an_early_error_of_a_later_run_leaves_what_a_long_one_has_finished(
    config, in_process, monkeypatch
):
    with broken_after(monkeypatch, 3, InputError("stop")), pytest.raises(InputError):
        preprocess(config)
    with (
        broken_after(monkeypatch, 2, KeyboardInterrupt(), worth_keeping=60),
        pytest.raises(KeyboardInterrupt),
    ):
        preprocess(config)
    with broken_after(monkeypatch, 99, None) as made:
        preprocess(config)
    assert len(made) == len(corpus.plan_shards(corpus.find_files(config.inputs, "/o"))) - 5


def test_an_early_error_leaves_nothing_at_all(config, in_process, tmp_path):
    with open(config.inputs[0], "a") as file:
        file.write("{\n")
    with pytest.raises(InputError, match=r"a\.jsonl line 61: not valid JSON \(.*\); mend it, or"):
        preprocess(config)
    assert os.listdir(tmp_path / "out") == []
    manifest = preprocess(changed(config, skip_bad=True))
    assert manifest.source["skipped"] == 1
    assert stored_texts(config) == TEXTS


def test_a_full_disk_is_an_error_of_the_work_folder_and_leaves_nothing(
    config, in_process, monkeypatch, tmp_path
):
    full = OSError(errno.ENOSPC, "No space left on device")
    with broken_after(monkeypatch, 2, full, worth_keeping=60), pytest.raises(OSError) as error:
        preprocess(config)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == config.output_prefix + ".shards"
    assert os.listdir(tmp_path / "out") == []


def test_shards_of_a_run_that_was_stopped_are_no_leave_to_replace_a_users_file(
    config, in_process, monkeypatch
):
    with broken_after(monkeypatch, 3, InputError("stop")), pytest.raises(InputError):
        preprocess(config)
    mine = Path(config.output_prefix + ".bin")
    mine.write_bytes(b"Megatron's")
    with pytest.raises(InputError, match=r"\.bin: was not made by an earlier run"):
        preprocess(config)
    assert mine.read_bytes() == b"Megatron's"


def test_a_run_killed_while_its_result_appears_is_gone_on_with(config, in_process, monkeypatch):
    class Killed(BaseException):
        pass

    def half(work_prefix, prefix):
        os.replace(work_prefix + ".bin", prefix + ".bin")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", half)
        patch.setattr(module, "_clear", lambda *arguments: None)
        with pytest.raises(Killed):
            preprocess(config)
    with broken_after(monkeypatch, 0, None) as made:  # nothing is tokenised again
        preprocess(config)
    assert made == []
    assert stored_texts(config) == TEXTS
