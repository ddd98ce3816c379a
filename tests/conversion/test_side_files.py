"""Ids and settings in forms that nobody expects: kept whole, or one line; never a traceback."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lctw_megatron.conversion import side_files
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.tokenizer_agreement import tokenizer_line
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import VOCABULARY, make_model
from tests.tools.test_convert import run

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model("llama", tmp_path_factory.mktemp("side_files") / "hf")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def with_config(plain: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(plain, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("ids", [{}, NO_IDS], ids=["config has ids", "config has none"])
@pytest.mark.parametrize(
    "content",
    [
        '{"temperature": NaN, "top_p": Infinity, "eos_token_id": [4, 2]}',
        '{"eos_token_id": NaN}', '{"eos_token_id": "x"}', '{"eos_token_id": {"a": [1]}}',
        '{"eos_token_id": [2, null], "pad_token_id": true, "bos_token_id": 2.5}', "{}",
        '{"eos_token_id": -1, "max_length": ' + "9" * 400 + "}",
    ],
)  # fmt: skip
def test_generation_settings_are_kept_whatever_they_say(
    plain: Path, tmp_path: Path, content: str, ids: dict[str, Any]
) -> None:
    hf = with_config(plain, tmp_path / "hf", **ids)
    (hf / "generation_config.json").write_text(content)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert (tmp_path / "back" / "generation_config.json").read_text() == content
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    if ids:
        assert {name: config[name] for name in NO_IDS} == NO_IDS
    else:
        assert config["eos_token_id"] == [4, 5]


@pytest.mark.parametrize("nulls", [NO_IDS, {"bos_token_id": None}, {"eos_token_id": None}])
def test_ids_that_are_null_are_null_to_transformers_after_the_way_there_and_back(
    plain: Path, tmp_path: Path, nulls: dict[str, Any]
) -> None:
    from transformers import AutoConfig, GenerationConfig

    hf = with_config(plain, tmp_path / "hf", **nulls)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    came, left = (AutoConfig.from_pretrained(folder) for folder in (hf, tmp_path / "back"))
    settings = GenerationConfig.from_pretrained(tmp_path / "back")
    for name in NO_IDS:
        assert getattr(left, name) == getattr(came, name) == getattr(settings, name)
        assert name not in nulls or getattr(left, name) is None


def test_ids_that_config_json_does_not_name_are_those_of_the_generation_settings(
    plain: Path, tmp_path: Path
) -> None:
    hf = with_config(plain, tmp_path / "hf")
    came = json.loads((hf / "config.json").read_text())
    without = {name: value for name, value in came.items() if name not in NO_IDS}
    (hf / "config.json").write_text(json.dumps(without))
    (hf / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [4, 2]


@pytest.mark.parametrize("content", ["[1]", "null", "", '{"a": 1', '{"a": "\\ud800"}', "[" * 999])
def test_generation_settings_that_are_none_are_refused(
    plain: Path, tmp_path: Path, content: str
) -> None:
    hf = with_config(plain, tmp_path / "hf")
    (hf / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json: "):
        import_hf(hf, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", {"a": 1}, 2.5, True, [2, "x"]])
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_ids_of_config_json_that_are_none_are_refused_by_name(
    plain: Path, tmp_path: Path, name: str, value: Any
) -> None:
    hf = with_config(plain, tmp_path / "hf", **{name: value})
    with pytest.raises(InputError, match=rf"config\.json: {name} is .*, expected a token id"):
        import_hf(hf, tmp_path / "checkpoint")


def test_a_field_that_only_sounds_like_an_id_is_read_over(plain: Path, tmp_path: Path) -> None:
    hf = with_config(plain, tmp_path / "hf", image_token_id=float("nan"))
    lines: list[str] = []
    import_hf(hf, tmp_path / "checkpoint", log=lines.append)
    assert "without meaning for llama: image_token_id" in lines[0]
    export_hf(tmp_path / "checkpoint", tmp_path / "back")


def test_padding_beyond_the_vocabulary_is_said_and_verify_ends_in_one_line(
    plain: Path, tmp_path: Path
) -> None:
    hf = with_config(plain, tmp_path / "hf", pad_token_id=VOCABULARY)
    imported = run(["import", "--hf", hf, "--output", tmp_path / "checkpoint"])
    assert imported.status == 0
    assert "pad_token_id 161 is beyond the vocabulary of 161, so transformers" in imported.stdout
    (tmp_path / "ids").write_text(" ".join(["5"] * 32))
    verify = ["verify", "--hf", hf, "--checkpoint", tmp_path / "checkpoint", "--length", 32]
    answer = run([*verify, "--tokens", tmp_path / "ids"])
    assert answer.status == 2, answer
    assert "hf: transformers cannot load it (Padding_idx must be within" in answer.stderr
    lines = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and answer.stderr.strip().splitlines()[-1] == lines[0]
    assert "Traceback" not in answer.stderr
    assert run([*verify, "--no-logits"]).status == 0


@pytest.mark.parametrize("pad", [-1, None, VOCABULARY - 1])
def test_padding_that_transformers_takes_is_not_spoken_of(
    plain: Path, tmp_path: Path, pad: int | None
) -> None:
    hf = with_config(plain, tmp_path / "hf", pad_token_id=pad)
    lines: list[str] = []
    import_hf(hf, tmp_path / "checkpoint", log=lines.append)
    assert [line for line in lines if "pad_token_id" in line] == []


def settings_that_leave(folder: Path, text: str) -> str:
    """What becomes of the tokenizer_config.json ``text`` of a checkpoint in an export."""
    source = folder / "checkpoint" / "tokenizer"
    source.mkdir(parents=True)
    (source / "tokenizer_config.json").write_text(text)
    side_files.take_out(source.parent, SimpleNamespace(tokenizer=None), folder / "hf")
    return (folder / "hf" / "tokenizer_config.json").read_text()


def test_names_that_only_transformers_5_knows_leave_as_version_4_has_them(tmp_path: Path) -> None:
    """4.48 to 4.57 refuse the class, and a list where they have a mapping. That they and 5.24 load
    the result with the same ids and special tokens was seen with 4.57.6."""
    tokens = ["<|extra|>", {"__type": "AddedToken", "content": "<|more|>"}]
    came = {"tokenizer_class": "TokenizersBackend", "model_max_length": 10**30, "é": float("inf")}
    left = json.loads(
        settings_that_leave(tmp_path, json.dumps(came | {"extra_special_tokens": tokens}))
    )
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": tokens}
    assert left == came | expected


@pytest.mark.parametrize(
    "text",
    [
        '{"tokenizer_class": "LlamaTokenizer",\n "extra_special_tokens": {"image_token": "<i>"}}',
        '{"tokenizer_class":"PreTrainedTokenizerFast", "additional_special_tokens":["<a>"]}',
        "{}",
    ],
)
def test_other_tokenizer_settings_leave_byte_for_byte(tmp_path: Path, text: str) -> None:
    assert settings_that_leave(tmp_path, text) == text


def test_a_folder_without_a_tokenizer_that_can_be_read_is_told(
    plain: Path, tmp_path: Path, hf_folder: Path
) -> None:
    """As where only weights were fetched, or vocab.json and merges.txt are all there is."""
    hf, said = with_config(plain, tmp_path / "hf"), list[str]()
    (hf / "vocab.json").write_text("{}")
    import_hf(hf, tmp_path / "without", log=said.append)
    assert said[-1].startswith(f"{hf}: has neither tokenizer.json nor tokenizer.model, so nothing")
    assert (tmp_path / "without" / "tokenizer" / "vocab.json").exists()
    shutil.copyfile(hf_folder / "tokenizer.json", hf / "tokenizer.json")
    import_hf(hf, tmp_path / "with", log=said.append)
    assert len(said) == 3 and said[-1].startswith("rope: ")


def test_files_that_mistral_common_reads_leave_as_they_came(plain: Path, tmp_path: Path) -> None:
    hf = with_config(plain, tmp_path / "hf")
    for name in ("tekken.json", "tokenizer.model.v3"):
        (hf / name).write_bytes(name.encode())
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    for name in ("tekken.json", "tokenizer.model.v3"):
        assert (tmp_path / "back" / name).read_bytes() == name.encode()


def test_code_that_a_tokenizer_brings_is_not_run_and_nobody_is_asked(
    plain: Path, hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    hf = with_config(plain, tmp_path / "hf", vocab_size=VOCABULARY)
    shutil.copy(hf_folder / "tokenizer.json", hf)
    code = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (hf / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": code, "tokenizer_class": "OwnTokenizer"})
    )
    said: list[str] = []
    import_hf(hf, tmp_path / "checkpoint", log=said.append)
    assert any("auto_map names code of the folder's own, which is not run" in line for line in said)
    assert "cannot load it" in tokenizer_line(hf, "some text") and not asked
