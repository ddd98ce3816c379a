"""What Megatron-LM has saved becomes a checkpoint of ours, and its pickles are not opened."""

import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from lctw_megatron.commands.convert import main
from lctw_megatron.conversion.checkpoint_reader import open_checked
from lctw_megatron.conversion.checkpoint_writer import CheckpointFiles
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.megatron_lm_import import import_megatron_lm
from lctw_megatron.conversion.placement import stored_tensors
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import read_manifest
from tests.conversion.hf_models import make_model


class Opened(Exception):
    pass


class Trap:
    """An object whose pickle runs code."""

    def __reduce__(self):
        return (_open, ())


def _open():
    raise Opened


def save_as_megatron_lm(checkpoint, folder, names=()):
    """The weights of ``checkpoint`` as Megatron-LM saves them: with another padding, which is not
    zero, beside things that only Megatron-LM reads. names: (ours, its own) of tensors."""
    model = read_manifest(checkpoint).model
    reader, tensors = open_checked(checkpoint), list(stored_tensors(model))
    saved = folder / "iter_0000012"
    saved.mkdir(parents=True)
    with CheckpointFiles(saved, {"args": Namespace(num_layers=1), "trap": Trap()}) as files:
        memory = torch.empty(2**20, dtype=torch.uint8).numpy()
        for stored in tensors:
            value = reader.read(stored, memory).clone()
            if stored.key.startswith("embedding"):
                value = torch.cat(
                    [value[: model.vocab_size], torch.full((300, value.shape[1]), 7.0)]
                )
                stored = replace(stored, shape=tuple(value.shape))
            for ours, theirs in names:
                stored = replace(stored, key=stored.key.replace(ours, theirs))
            files.add(stored, value)
    (folder / "latest_checkpointed_iteration.txt").write_text("12\n")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A Hugging Face folder, its checkpoint, and the same weights saved by Megatron-LM."""
    folder = tmp_path_factory.mktemp("from_megatron_lm")
    hf = make_model("qwen3_tied", folder / "hf")
    import_hf(hf, folder / "checkpoint", log=lambda line: None)
    save_as_megatron_lm(folder / "checkpoint", folder / "saved")
    return folder


def weights(checkpoint):
    reader, tensors = open_checked(checkpoint), stored_tensors(read_manifest(checkpoint).model)
    memory = torch.empty(2**20, dtype=torch.uint8).numpy()
    return {(s.key, s.place): reader.read(s, memory).clone() for s in tensors}


def test_weights_and_manifest_are_those_of_the_import_from_hugging_face(scene, tmp_path, capsys):
    with pytest.raises(Opened):
        torch.load(scene / "saved" / "iter_0000012" / "common.pt", weights_only=False)
    command = ["import", "--hf", str(scene / "hf"), "--megatron-lm", str(scene / "saved")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    expected, found = weights(scene / "checkpoint"), weights(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[place], found[place]) for place in expected)
    manifests = [read_manifest(path) for path in (tmp_path / "out", scene / "checkpoint")]
    ours, theirs = (m.model_copy(update={"checksums": None}) for m in manifests)
    assert ours == theirs
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert "is finished, nothing to do" in capsys.readouterr().out
    # One iteration's folder, in another precision.
    import_megatron_lm(scene / "saved" / "iter_0000012", scene / "hf", tmp_path / "half", "bf16")
    assert read_manifest(tmp_path / "half").dtype == "bf16"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: (s / "latest_checkpointed_iteration.txt").unlink(), "holds neither latest_"),
        (
            lambda s: (s / "latest_checkpointed_iteration.txt").write_text("new"),
            "is 'new', expected",
        ),
        (
            lambda s: (s / "latest_checkpointed_iteration.txt").write_text("1" * 5000),
            "is '1111.*, expected",
        ),
        (
            lambda s: [
                (s / "latest_checkpointed_iteration.txt").unlink(),
                (s / "mp_rank_00").mkdir(),
            ],
            "saved: has no .metadata, as only --ckpt-format torch_dist writes",
        ),
        (
            lambda s: (s / "latest_checkpointed_iteration.txt").write_text("11"),
            "iter_0000011: missing, but",
        ),
        (lambda s: (s / "iter_0000012" / "__0_0.distcp").write_bytes(b""), "__0_0.distcp: 0 bytes"),
    ],
)
def test_what_is_not_there_is_named(scene, tmp_path, change, named):
    shutil.copytree(scene / "saved", tmp_path / "saved")
    change(tmp_path / "saved")
    with pytest.raises(InputError, match=named) as error:
        import_megatron_lm(tmp_path / "saved", scene / "hf", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_experts_come_in_also_from_layers_that_are_not_transformer_engine_s(tmp_path):
    hf = make_model("mixtral", tmp_path / "hf")
    import_hf(hf, tmp_path / "checkpoint", log=lambda line: None)
    expected = weights(tmp_path / "checkpoint")
    local = [("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")]
    for name, names in {"te": (), "local": local}.items():
        save_as_megatron_lm(tmp_path / "checkpoint", tmp_path / name, names)
        import_megatron_lm(tmp_path / name, hf, tmp_path / f"{name}_in", log=lambda line: None)
        found = weights(tmp_path / f"{name}_in")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[place], found[place]) for place in expected)


def test_a_config_json_of_another_model_is_refused(scene, tmp_path):
    other = make_model("llama", tmp_path / "other")
    with pytest.raises(InputError, match="its weights are not those of .*other/config.json: "):
        import_megatron_lm(scene / "saved", other, tmp_path / "out")
