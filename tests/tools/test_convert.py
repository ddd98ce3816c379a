"""tools/convert.py as a user runs it: exit statuses, one-line errors, nothing half-written."""

import io
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from tests.conversion.hf_models import make_model, random_tokens

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


def run(arguments: list[object]) -> Result:
    """tools/convert.py in this process, which has paid for the imports already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["convert.py", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path(str(ROOT / "tools" / "convert.py"), run_name="__main__")
    return Result(ended.value.code or 0, out.getvalue(), err.getvalue())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, hf_folder):
    """Two models with a tokenizer and their checkpoints, and one with one element changed."""
    import torch
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("convert")
    make_model("llama", root / "hf", vocab_size=500)
    for path in Path(hf_folder).iterdir():
        shutil.copyfile(path, root / "hf" / path.name)
    result = run(["import", "--hf", root / "hf", "--output", root / "checkpoint"])
    assert result.status == 0, result.stderr
    assert "imported 39 tensors" in result.stdout and "peak memory" in result.stdout
    shutil.copytree(root / "hf", root / "changed")
    tensors = load_file(root / "changed" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += torch.tensor(0.25)
    save_file(tensors, root / "changed" / "model.safetensors", {"format": "pt"})
    ids = " ".join(map(str, random_tokens(70)[0].tolist()))
    (root / "ids").write_text(ids)
    (root / "text").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (root / "a_file").write_text("not a folder")
    return root


def test_exit_statuses_and_messages(folders):
    hf, checkpoint, changed = (folders / name for name in ("hf", "checkpoint", "changed"))
    no = folders / "none"
    verify = ["verify", "--checkpoint", checkpoint, "--length", 64, "--hf"]
    export = ["export", "--checkpoint", checkpoint, "--output"]
    small_shards = ["--dtype", "bf16", "--max-shard-size", "200kB"]
    cases: list[tuple[list[object], int, str]] = [
        ([*verify, hf, "--text", folders / "text"], 0, "verify: equal"),
        ([*verify, hf, "--tokens", folders / "ids"], 0, "verify: equal"),
        ([*verify, hf, "--no-logits"], 0, "all  "),
        ([*verify, hf, "--no-logits"], 0, "tokenizer: equal"),
        ([*verify, changed], 1, "verify: DIFFERENT"),
        ([*verify, hf, "--tokens", folders / "text"], 2, "expected token ids"),
        ([*verify, hf, "--tokens", folders / "ids", "--length", 80], 2, "only 70 tokens"),
        ([*verify, hf, "--text", no], 2, "no such file"),
        ([*verify, no], 2, "config.json: missing"),
        (["verify", "--hf", hf, "--checkpoint", no], 2, "no complete checkpoint"),
        ([*export, folders / "out", *small_shards], 0, "exported 39 tensors"),
        ([*export, folders / "out", *small_shards], 0, "is finished, nothing to do"),
        ([*export, folders / "out", "--dtype", "fp16"], 0, "is replaced"),
        ([*export, folders], 2, "would be replaced; name another"),
        ([*export, folders / "checkpoint", "--dtype", "bf16"], 2, "is read from"),
        (["import", "--hf", folders / "out", "--output", folders / "out"], 2, "is read from"),
        ([*export, no, "--max-shard-size", "9" * 400 + "GB"], 2, "expected a number and a unit"),
        ([*export, no, "--max-shard-size", "5 potatoes"], 2, "'5 potatoes'"),
        ([*export, no, *small_shards, "--format", "megatron-lm"], 2, "is for --format hf"),
        ([*export, folders / "a_file" / "out"], 2, "a folder was expected"),
        (["export", "--checkpoint", folders, "--output", no], 2, "no complete checkpoint"),
        (["import", "--hf", hf, "--output", "/proc/out"], 2, "error: /proc/"),
        (["import", "--hf", no, "--output", no], 2, "config.json: missing"),
        (["import", "--hf", hf, "--output", no, "--dtype", "fp8"], 2, "invalid choice: 'fp8'"),
        (["import", "--hf", hf], 2, "--output"),
        (["transmogrify"], 2, "transmogrify"),
    ]
    for arguments, status, said in cases:
        result = run(arguments)
        text = result.stdout + result.stderr
        assert result.status == status, (arguments, text)
        assert said in text, (arguments, text)
        assert "Traceback" not in text, text
        if status == 2 and "usage:" not in result.stderr:
            assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not no.exists()
    assert (folders / "out" / "model.safetensors").is_file()
    assert not [path for path in folders.iterdir() if path.name.startswith(".")]
