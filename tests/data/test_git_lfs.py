"""A pointer that git left in a file's place is called that, wherever the file would be read; a
corpus would have it as text."""

import shutil

import pytest

from lctw_megatron.conversion.hf_safetensors import INDEX, SafetensorsFolder
from lctw_megatron.data.preprocessing.corpus import find_files
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'7b' * 32}\nsize 9085657\n"


@pytest.mark.parametrize(
    "name, read",
    [
        ("a.txt", lambda folder: find_files([str(folder)], "/nowhere/out")),
        ("a.jsonl.zst", lambda folder: find_files([str(folder / "*")], "/nowhere/out")),
        ("a.parquet", lambda folder: find_files([str(folder / "a.parquet")], "/nowhere/out")),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer.model", load_tokenizer),
        ("a.model", lambda folder: load_tokenizer(folder / "a.model")),
        ("model.safetensors", SafetensorsFolder),
        ("model-1.safetensors", SafetensorsFolder),
    ],
)
def test_a_pointer_is_called_one(name, read, tmp_path):
    (tmp_path / name).write_text(POINTER)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    if "model-1" not in name:
        (tmp_path / INDEX).unlink()
    with pytest.raises(
        InputError, match="only the pointer that git leaves .* git lfs pull"
    ) as said:
        read(tmp_path)
    assert str(said.value).startswith(f"{tmp_path / name}: ")


def test_a_pointer_beside_the_tokenizer_that_is_read_does_no_harm(hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").write_text(POINTER)
    known = load_tokenizer(hf_folder).identity.digest
    assert load_tokenizer(tmp_path / "both").identity.digest == known
