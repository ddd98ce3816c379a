"""Conversions appear whole or not at all, are not done twice, and overwrite nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lctw_megatron.conversion import hf_export
from lctw_megatron.conversion.checkpoint_reader import CheckpointReader
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import find_checkpoint, read_manifest, write_manifest
from lctw_megatron.ownership import sole_writer
from tests.conversion.hf_models import assert_same_tensors, make_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    make_model("llama", root / "hf")
    import_hf(root / "hf", root / "checkpoint")
    return root


class Said(list[str]):
    """The lines of conversions but for what they say of rope and tokenizer."""

    def note(self, line: str) -> None:
        if not line.startswith("rope: ") and "tokenizer" not in line:
            self.append(line)


def test_finished_work_is_not_done_again(made, tmp_path):
    said = Said()
    for _ in range(2):
        import_hf(made / "hf", tmp_path / "checkpoint", log=said.note)
        export_hf(tmp_path / "checkpoint", tmp_path / "out", log=said.note)
    assert [line.split(": ")[1] for line in said] == ["is finished, nothing to do"] * 2
    assert import_hf(made / "hf", tmp_path / "checkpoint").bytes == 0


def test_output_made_from_something_else_is_replaced_unless_the_user_added_to_it(made, tmp_path):
    make_model("qwen2", tmp_path / "other_hf")
    import_hf(tmp_path / "other_hf", tmp_path / "other")
    export_hf(tmp_path / "other", tmp_path / "out")
    said = Said()
    export_hf(made / "checkpoint", tmp_path / "out", log=said.note)
    assert said == [f"{tmp_path / 'out'}: was made from something else, is replaced"]
    assert_same_tensors(made / "hf", tmp_path / "out")
    for change in ({"dtype": "bf16"}, {"max_file_bytes": 1000}):
        assert export_hf(made / "checkpoint", tmp_path / "out", **change).bytes > 0
    (tmp_path / "out" / "README.md").write_text("a model card")
    with pytest.raises(InputError, match="out: was made from .* files of yours: README.md;"):
        export_hf(tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize("mark", ["of now", "of before"])
def test_what_the_user_edited_is_not_replaced_by_what_is_made_of_something_else(
    made, tmp_path, mark
):
    output = tmp_path / "out"
    export_hf(made / "checkpoint", output, dtype="bf16")
    if mark == "of before":  # sizes alone
        values = json.loads((output / "conversion.json").read_text())
        values["files"] = {name: (output / name).stat().st_size for name in values["files"]}
        (output / "conversion.json").write_text(json.dumps(values))
    config = output / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"use_cache": true', '"use_cache": null'))
    if mark == "of before":
        config.write_text(config.read_text() + "\n")
    edited = config.read_text()
    assert export_hf(made / "checkpoint", output, dtype="bf16").bytes == 0
    with pytest.raises(InputError, match="made from something .* files of yours: config.json; rem"):
        export_hf(made / "checkpoint", output)
    assert config.read_text() == edited != whole
    config.write_text(whole)
    assert export_hf(made / "checkpoint", output).bytes > 0


def test_a_folder_of_the_users_is_never_overwritten(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for convert, source in ((import_hf, made / "hf"), (export_hf, made / "checkpoint")):
        with pytest.raises(InputError, match="mine: exists and was not written by this command"):
            convert(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(made, tmp_path):
    (tmp_path / "empty").mkdir()
    export_hf(made / "checkpoint", tmp_path / "empty")
    assert_same_tensors(made / "hf", tmp_path / "empty")


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "nothing yet"])
def test_a_link_stays_and_leads_to_what_was_made(made, tmp_path, there):
    """As from a small home to a large disk."""
    disk, link = tmp_path / "disk" / "out", tmp_path / "home" / "out"
    link.parent.mkdir()
    if there:
        disk.mkdir(parents=True)
    link.symlink_to(disk)
    for dtype in ("keep", "bf16"):  # made, and replaced
        export_hf(made / "checkpoint", link, dtype=dtype)
        assert link.is_symlink() and (disk / "config.json").is_file()
    assert [path.name for path in tmp_path.rglob("*out*")] == ["out"] * 2
    assert export_hf(made / "checkpoint", disk, dtype="bf16").bytes == 0


def test_a_mount_point_is_refused_before_the_work(made, tmp_path, monkeypatch):
    """As of a container. It cannot be renamed, so all was done in vain."""
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "mounted")
    monkeypatch.setattr(hf_export, "_write", None)
    with pytest.raises(InputError, match="--output .*/mounted: is a mount point, .*name a folder"):
        export_hf(made / "checkpoint", tmp_path / "mounted")
    assert list(tmp_path.iterdir()) == [tmp_path / "mounted"]


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_killed_conversion_leaves_nothing_of_the_outputs_name(verb, made, tmp_path):
    output = tmp_path / "output"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lctw_megatron import progress\n"
        "from lctw_megatron.conversion.hf_import import import_hf\n"
        "from lctw_megatron.conversion.hf_export import export_hf\n"
        "def kill(self, *amounts, **counters):\n"
        "    self.done += 1\n"
        "    if self.done > 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "progress.Progress.update = kill\n"
        f"{verb}_hf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    source = made / ("hf" if verb == "import" else "checkpoint")
    command = [sys.executable, "-c", program, str(source), str(output)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    # Half-written, under no such name, and the lock.
    left = sorted(name for name in os.listdir(tmp_path) if name != ".output.lock")
    assert len(left) == 1 and left[0].startswith(".output.")
    strangers = tmp_path / ".output.0123abcd.tmp"
    strangers.mkdir()
    (strangers / "thesis.tex").write_text("years of work")
    (tmp_path / ".output.89abcdef.tmp").symlink_to(strangers)
    said = Said()
    convert = import_hf if verb == "import" else export_hf
    convert(source, output, log=said.note)
    assert said == [
        f"{tmp_path / left[0]}: left by a run that was killed, removed",
    ]
    (tmp_path / ".output.89abcdef.tmp").unlink()
    assert sorted(os.listdir(tmp_path)) == [strangers.name, "output"]
    assert os.listdir(strangers) == ["thesis.tex"]
    if verb == "import":
        assert find_checkpoint(output) == output
    else:
        assert_same_tensors(made / "hf", output)


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_second_conversion_into_one_output_is_refused(verb, made, tmp_path):
    source, output = made / ("hf" if verb == "import" else "checkpoint"), tmp_path / "output"
    convert = import_hf if verb == "import" else export_hf
    with sole_writer(output, print), pytest.raises(InputError, match="output: is being written by"):
        convert(source, output)
    assert os.listdir(tmp_path) == []
    convert(source, output)
    with sole_writer(output, print):  # of somebody who looks at it too
        assert convert(source, output).bytes == 0
    assert os.listdir(tmp_path) == ["output"]


@pytest.mark.parametrize("how", ["cut", "lost"])
def test_a_finished_folder_with_a_cut_or_lost_file_is_made_again(how, made, tmp_path):
    said = Said()
    for convert, source, ending in (
        (import_hf, made / "hf", "distcp"),
        (export_hf, made / "checkpoint", "safetensors"),
    ):
        output = tmp_path / ending
        convert(source, output)
        (path,) = output.glob(f"*.{ending}")
        whole = path.read_bytes()
        path.write_bytes(whole[:-1]) if how == "cut" else path.unlink()
        convert(source, output, log=said.note)
        assert f"is damaged ({path.name} missing or of another size), is replaced" in said.pop()
        assert path.stat().st_size == len(whole)
    (output / "config.json").write_text("{}")  # edited by the user
    assert convert(source, output).bytes == 0 and (output / "config.json").read_text() == "{}"


def test_a_failing_conversion_leaves_nothing_at_all(made, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointReader, "read", fail)
    with pytest.raises(OSError, match="No space left"):
        export_hf(made / "checkpoint", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(hf_export.SafetensorsWriter, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        export_hf(made / "checkpoint", tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("spoil", ["cut off", "missing", "overwritten", "hole", "foreign weight"])
def test_a_damaged_checkpoint_is_not_exported(spoil, made, tmp_path):
    import_hf(made / "hf", tmp_path / "checkpoint")
    path = next((tmp_path / "checkpoint").glob("*.distcp"))
    data = path.read_bytes()
    if spoil == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif spoil == "missing":
        path.unlink()
    elif spoil == "overwritten":
        path.write_bytes(b"\0" * len(data))
    else:
        import pickle

        index = tmp_path / "checkpoint" / ".metadata"
        metadata = pickle.loads(index.read_bytes())
        tensors = metadata.state_dict_metadata
        if spoil == "hole":
            del tensors["decoder.layers.mlp.linear_fc2.weight"].chunks[2]
        else:
            tensors["decoder.layers.mlp.router.weight"] = tensors.pop(
                "decoder.final_layernorm.weight"
            )
        index.write_bytes(pickle.dumps(metadata))
    # The checksums would find it: what is found without them?
    write_manifest(tmp_path / "checkpoint", read_manifest(tmp_path / "checkpoint"))
    with pytest.raises(InputError) as caught:
        export_hf(tmp_path / "checkpoint", tmp_path / "out")
    said = {
        "cut off": "expected", "missing": "missing", "overwritten": "damaged",
        "hole": "0 of 4800 elements of decoder.layers.mlp.linear_fc2.weight, layer 2",
        "foreign weight": "decoder.final_layernorm.weight is missing; "
        "decoder.layers.mlp.router.weight is unknown",
    }  # fmt: skip
    assert said[spoil] in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


def test_the_exported_config_is_that_of_the_trained_model(made, tmp_path):
    from transformers import AutoModelForCausalLM

    import_hf(made / "hf", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    # As training does after extending the context.
    manifest["model"] |= {"rope_theta": 15.3e6, "max_position_embeddings": 32768}
    manifest |= {"step": 100}
    path.write_text(json.dumps(manifest))
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 15.3e6 and config["max_position_embeddings"] == 32768
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies[1].item() == pytest.approx(15.3e6 ** (-2 / 20), rel=1e-6)
