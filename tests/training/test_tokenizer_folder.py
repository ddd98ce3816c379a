"""Which tokenizer files a run's checkpoints carry."""

import json
import shutil
from pathlib import Path

import pytest

from lctw_megatron.data.token_dataset import TokenWriter
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.training.loop import train
from lctw_megatron.training.tokenizer_folder import TokenizerFolder
from tests.tokenizer_files import hf_folder, sentencepiece_model
from tests.training.layouts import make_run

__all__ = ["hf_folder", "sentencepiece_model"]


def start_of(folder: Path, tokenizer: Path) -> Path:
    load_tokenizer(tokenizer).save_hf(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_tokenizer_that_has_changed_since_preprocessing_is_refused(
    hf_folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(hf_folder, tmp_path / "source"))
    identity = load_tokenizer(source).identity
    description = json.loads((source / "tokenizer.json").read_text())
    description["model"]["merges"].reverse()
    (source / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=f"source: its digest is .* {identity.digest}; restore"):
        TokenizerFolder(identity, None)


def test_a_model_file_alone_means_the_start_s_folder(
    sentencepiece_model: Path, tmp_path: Path
) -> None:
    start = start_of(tmp_path / "start", sentencepiece_model)
    identity = load_tokenizer(sentencepiece_model).identity
    TokenizerFolder(identity, start).write(tmp_path / "run")
    names = {path.name for path in start.iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert load_tokenizer(tmp_path / "run").identity.digest == identity.digest


def test_the_data_s_folder_is_taken_whole_and_lacking_settings_from_the_start(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = start_of(tmp_path / "start", hf_folder)
    TokenizerFolder(load_tokenizer(hf_folder).identity, start).write(tmp_path / "run")
    assert not (tmp_path / "run" / "chat_template.jinja").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (hf_folder / name).read_bytes()
    assert (tmp_path / "run" / "generation_config.json").read_bytes() == (
        start / "generation_config.json"
    ).read_bytes()
    assert f"{hf_folder}: made the data, so" in (said := capsys.readouterr().out)
    assert "where they differ: chat_template.jinja; copy into it" in said


def test_what_the_start_has_otherwise_is_said_and_nothing_where_all_is_alike(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = start_of(Path(shutil.copytree(hf_folder, tmp_path / "source")), hf_folder)
    start = start_of(tmp_path / "start", hf_folder)
    identity = load_tokenizer(source).identity
    TokenizerFolder(identity, start).write(tmp_path / "run")
    assert capsys.readouterr().out == ""
    (start / "generation_config.json").write_text('{"eos_token_id": 1}')
    (start / "config.json").write_text('{"eos_token_id": 1}')
    TokenizerFolder(identity, start).write(tmp_path / "run")
    said = capsys.readouterr().out
    assert "where they differ: generation_config.json, config.json; copy" in said


def test_without_any_tokenizer_the_checkpoints_carry_none_and_say_so(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = load_tokenizer(hf_folder).identity.model_copy(update={"path": str(tmp_path / "x")})
    TokenizerFolder(identity, None).write(tmp_path / "run")
    assert "x: not found" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_generation_settings_of_a_start_without_a_tokenizer_are_carried_on(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    identity = load_tokenizer(hf_folder).identity.model_copy(update={"path": str(tmp_path / "x")})
    folder = TokenizerFolder(identity, start).write(tmp_path / "run")
    assert folder == tmp_path / "run" and "x: not found" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["generation_config.json"]


def test_a_tokenizer_that_has_gone_since_the_run_began_stays_in_its_checkpoints(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(hf_folder, tmp_path / "source"))
    identity = load_tokenizer(source).identity
    TokenizerFolder(identity, None).write(tmp_path / "run")
    shutil.rmtree(source)
    assert TokenizerFolder(identity, None).write(tmp_path / "run") == tmp_path / "run"
    assert capsys.readouterr().out == ""
    assert load_tokenizer(tmp_path / "run").identity.digest == identity.digest


def test_a_changed_tokenizer_is_refused_before_anything_is_loaded_or_written(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(hf_folder, tmp_path / "source"))
    tokenizer = load_tokenizer(source)
    with TokenWriter(tmp_path / "tokens", tokenizer.identity) as writer:
        for ids in tokenizer.encode_documents(["some text " * 200] * 3):
            writer.add(ids)
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|begin|>"}))
    run = make_run(str(tmp_path / "tokens"), str(tmp_path / "run"), {}, "chunk", "uniform", "self")
    run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": 500})})
    monkeypatch.setattr("lctw_megatron.training.loop.build_model", None)
    with pytest.raises(InputError, match="source: its digest is .*; restore its files"):
        train(run)
    assert list((tmp_path / "run").iterdir()) == []
