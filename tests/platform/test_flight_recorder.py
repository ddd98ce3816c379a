"""Where torch leaves what it recorded of the collectives."""

from pathlib import Path

import pytest

from lctw_megatron.platform import flight_recorder


def test_its_folder_is_made_only_when_asked_for_and_not_before_the_run_may_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*flight_recorder._BUFFER, *flight_recorder._FILES):
        for variable in (name, f"LCTW_{name}"):
            monkeypatch.setenv(variable, "")  # so that what is set from here on goes in the end
            monkeypatch.delenv(variable)
    flight_recorder.record_into(tmp_path)
    flight_recorder.make_place()
    assert not list(tmp_path.iterdir())  # nobody asks for records
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    flight_recorder.record_into(tmp_path)
    assert not list(tmp_path.iterdir())  # the run's data may be refused yet
    flight_recorder.make_place()
    assert (tmp_path / "flight_recorder").is_dir()
