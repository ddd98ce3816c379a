"""Damaged files, lying indices and wrong tensors: refused before writing, all of them by name."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.hf_safetensors import INDEX
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import make_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    make_model("llama", folder / "sharded", shard_size="100KB")
    make_model("llama31_tied", folder / "tied")
    make_model("qwen2", folder / "single")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def refusal(originals, tmp_path):
    """Copy a folder, spoil it, import it: the error's text; nothing may have been written."""

    def run(name: str, spoil: Callable[[Path], None]) -> str:
        folder = shutil.copytree(originals / name, tmp_path / name)
        spoil(folder)
        with pytest.raises(InputError) as caught:
            import_hf(folder, tmp_path / "out", log=lambda text: None)
        assert os.listdir(tmp_path) == [name]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def with_a_name_twice(data: bytes) -> bytes:
    """A header that gives its last tensor two times, alike, which the library takes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip()
    last = header[header.rindex(b'},"') + 1 : -1]
    header = header[:-1] + last + b"}"
    return len(header).to_bytes(8, "little") + header + data[end:]


def test_every_missing_shard_is_named(refusal):
    def spoil(folder: Path) -> None:
        for path in shards(folder)[:2]:
            path.unlink()

    text = refusal("sharded", spoil)
    assert "model-00001-of-" in text and "model-00002-of-" in text and "missing" in text


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda data: data[:-100], "damaged"),  # cut off
        (lambda data: data + b"x", "damaged"),  # longer than its header says
        (lambda data: data[:5], "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "damaged"),  # an absurd header length
        (lambda data: data[:8] + b"!" + data[9:], "not valid"),
        (lambda data: data.replace(b'"F32"', b'"F16"', 1), "bytes for F16"),
        (lambda data: data.replace(b"[0,", b"[9,", 1), "damaged"),
        (lambda data: with_a_name_twice(data), "a name occurs twice"),
    ],
)
def test_every_damaged_shard_is_named(refusal, spoil, said):
    def spoil_two(folder: Path) -> None:
        for path in shards(folder)[:2]:
            path.write_bytes(spoil(path.read_bytes()))

    text = refusal("sharded", spoil_two)
    assert "model-00001-of-" in text and "model-00002-of-" in text and said in text


def test_an_index_that_names_the_wrong_file_is_refused(refusal):
    def swap(where: dict[str, str]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        where[name] = next(file for file in where.values() if file != where[name])

    text = refusal("sharded", lambda folder: change_index(folder, swap))
    assert "model.layers.0.mlp.up_proj.weight is not in model-" in text


def test_tensors_that_the_index_hides_are_named(refusal):
    hidden = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    text = refusal(
        "sharded", lambda folder: change_index(folder, lambda where: [where.pop(n) for n in hidden])
    )
    assert all(name in text for name in hidden) and "not in the index" in text


def test_tensors_that_only_the_index_has_are_named(refusal):
    def invent(where: dict[str, str]) -> None:
        file = next(iter(where.values()))
        where |= {"model.extra_one": file, "model.extra_two": file}

    text = refusal("sharded", lambda folder: change_index(folder, invent))
    assert "model.extra_one is not in" in text and "model.extra_two is not in" in text


def test_an_index_does_not_lead_out_of_its_folder(refusal):
    def lead_out(where: dict[str, str]) -> None:
        for name in where:
            where[name] = "../elsewhere.safetensors"

    text = refusal("sharded", lambda folder: change_index(folder, lead_out))
    assert "../elsewhere.safetensors" in text and "do not belong" in text


def test_all_missing_unknown_and_wrongly_shaped_tensors_are_named_at_once(refusal):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_proj.bias"], tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(3)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(48, 99)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:160].contiguous()
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(100, 48, dtype=torch.int8)

    text = refusal("single", lambda folder: change_tensors(folder, change))
    for said in (
        "model.layers.1.self_attn.q_proj.bias is missing",
        "model.norm.weight is missing",
        "model.layers.0.mlp.gate.weight is unknown",
        "model.layers.7.mlp.up_proj.weight is unknown",
        "model.layers.2.mlp.down_proj.weight is [48, 99], expected [48, 100]",
        "lm_head.weight is [160, 48], expected [161, 48]",
        "model.layers.3.mlp.up_proj.weight has dtype I8",
    ):
        assert said in text, f"{said!r} not in {text!r}"


def test_a_line_about_many_tensors_stays_short(refusal):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            tensors[name.replace("mlp", "feed_forward")] = tensors.pop(name)

    said = refusal("single", lambda folder: change_tensors(folder, spoil))
    assert said.endswith(" and 16 more") and said.count(" is ") == 8, said


@pytest.mark.parametrize("prefix", ["_orig_mod.", "language_model.", "module.base."])
@pytest.mark.parametrize("name", ["single", "tied"])
def test_a_prefix_of_all_names_is_said_once(refusal, prefix, name):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)

    said = refusal(name, lambda folder: change_tensors(folder, spoil))
    found = re.search(r"all (\d+) names begin with (\S+), expected e.g. (\S+);", said)
    assert found and found[2] == prefix and found[3] == "model.embed_tokens.weight", said
    assert said.count(prefix) == 1


def test_a_prefix_of_some_names_is_counted(refusal):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors["language_model." + key] = tensors.pop(key)
        tensors["vision_tower.patch.weight"] = torch.zeros(3)

    said = refusal("single", lambda folder: change_tensors(folder, spoil))
    found = re.search(r"(\d+) of (\d+) names begin with language_model\.,", said)
    assert found and int(found[2]) - int(found[1]) == 1, said


def test_mixed_dtypes_need_a_choice(originals, tmp_path):
    folder = shutil.copytree(originals / "single", tmp_path / "mixed")
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {"model.norm.weight": tensors["model.norm.weight"].bfloat16()}
        ),
    )
    with pytest.raises(InputError, match="1 in bf16.*in fp32; choose one with --dtype"):
        import_hf(folder, tmp_path / "out", log=lambda text: None)
    import_hf(folder, tmp_path / "out", "fp32", log=lambda text: None)


def test_pickled_weights_are_refused(refusal):
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    text = refusal("single", spoil)
    assert "pytorch_model.bin" in text and "pickle" in text and "safetensors" in text


def test_shards_without_an_index_are_refused(refusal):
    text = refusal("sharded", lambda folder: (folder / INDEX).unlink())
    assert INDEX in text and "model-00001-of-" in text


def test_a_folder_without_weights_is_refused(refusal):
    text = refusal("single", lambda folder: (folder / "model.safetensors").unlink())
    assert "no model.safetensors" in text


def name_weights(folder: Path, name: str | None) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"transformers_weights": name}))


def test_weights_that_transformers_would_not_load_are_not_read(originals, tmp_path, refusal):
    text = refusal("single", lambda folder: name_weights(folder, "averaged.safetensors"))
    assert "transformers_weights is 'averaged.safetensors', but model.safetensors is what" in text
    shutil.rmtree(tmp_path / "single")
    text = refusal("sharded", lambda folder: name_weights(folder, "model.safetensors"))
    assert "but model.safetensors.index.json is what" in text


def test_an_adapter_is_not_read_over_nor_taken_for_a_model(originals, tmp_path, refusal):
    """With peft installed transformers loads its base model and it, not the weights beside it."""
    spoil = lambda folder: (folder / "adapter_config.json").write_text("{}")  # noqa: E731
    text = refusal("single", spoil)
    assert "adapter_config.json: makes the folder an adapter's" in text
    assert "if model.safetensors holds the merged weights" in text
    shutil.rmtree(tmp_path / "single")

    def only_the_adapter(folder: Path) -> None:
        spoil(folder)
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")

    assert "holds an adapter (adapter_config.json), not a model; merge" in refusal(
        "single", only_the_adapter
    )


@pytest.mark.parametrize("name", [None, "model.safetensors", "./model.safetensors"])
def test_weights_may_be_named_that_are_read_anyway(originals, tmp_path, name):
    folder = shutil.copytree(originals / "single", tmp_path / "single")
    name_weights(folder, name)
    said = []
    import_hf(folder, tmp_path / "out", log=said.append)
    assert not [line for line in said if "without meaning" in line]


def test_a_copy_of_tied_embeddings_must_be_a_copy(originals, tmp_path, refusal):
    def copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def differ(tensors: dict[str, torch.Tensor]) -> None:
        copy(tensors)
        tensors["lm_head.weight"][160, 47] += 1e-3

    text = refusal("tied", lambda folder: change_tensors(folder, differ))
    assert "lm_head.weight differs from model.embed_tokens.weight" in text
    folder = shutil.copytree(originals / "tied", tmp_path / "copy")
    change_tensors(folder, copy)
    import_hf(folder, tmp_path / "out", log=lambda text: None)
