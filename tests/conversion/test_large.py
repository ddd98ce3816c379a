"""Large models: how much memory conversions take and how fast they are. Prints what it measured.

Both need several GB on the disk, so they belong to `make test-all`.
"""

import filecmp
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion.hf_config import config_values
from lctw_megatron.conversion.placement import stored_tensors
from lctw_megatron.conversion.safetensors_writer import SafetensorsWriter, plan_files

ROOT = Path(__file__).parents[2]
GB = 10**9

TWO_GB = ModelConfig(
    num_layers=16, hidden_size=2048, ffn_hidden_size=7168, num_attention_heads=32,
    num_query_groups=8, vocab_size=64000, max_position_embeddings=8192,
)  # fmt: skip
SHAPE_OF_70B = ModelConfig(  # Llama 2 70B but for its depth, on which the memory does not depend
    num_layers=2, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64,
    num_query_groups=8, vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip


def tensor_bytes(model: ModelConfig) -> list[int]:
    """Of every Hugging Face tensor in bfloat16."""
    return [2 * math.prod(part.shape) for s in stored_tensors(model) for part in s.parts]


def make_random(model: ModelConfig, folder: Path, max_file_bytes: int) -> None:
    """A Hugging Face folder of random bfloat16 weights, written as it is made."""
    folder.mkdir()
    shapes = {part.name: part.shape for s in stored_tensors(model) for part in s.parts}
    random = torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    files = plan_files(shapes, torch.bfloat16, max_file_bytes)
    with SafetensorsWriter(folder, files, torch.bfloat16) as writer:
        for position, (name, shape) in enumerate(shapes.items()):
            writer.begin(name)
            left = math.prod(shape)
            while left:
                # From another place for every tensor, so that no two begin alike.
                start = 12347 * position % (random.numel() // 2)
                count = min(left, random.numel() - start)
                writer.write(random[start : start + count])
                left -= count
    (folder / "config.json").write_text(json.dumps(config_values(model, "bf16", {})))


def convert(*arguments: object) -> tuple[float, float]:
    """Run tools/convert.py; the seconds (without Python's start) and the peak GB that it prints."""
    result = subprocess.run(
        [sys.executable, "tools/convert.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = re.search(r"in ([\d.]+) s .*peak memory ([\d.]+) GB", result.stdout)
    assert found, result.stdout
    return float(found[1]), float(found[2])


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy a file and wait until it is on the disk."""
    start = time.monotonic()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    seconds = time.monotonic() - start
    target.unlink()
    return seconds


def need_disk(folder: Path, amount: float) -> None:
    free = shutil.disk_usage(folder).free / GB
    if free < amount:
        pytest.skip(f"{free:.0f} GB free in {folder}, {amount:.0f} needed")


@pytest.mark.long
def test_two_gigabytes_come_back_bit_for_bit_beside_a_plain_copy(tmp_path, capsys):
    size = sum(tensor_bytes(TWO_GB)) / GB
    need_disk(tmp_path, 5 * size)
    make_random(TWO_GB, tmp_path / "hf", 5 * GB)
    weights = tmp_path / "hf" / "model.safetensors"
    times: dict[str, list[float]] = {"plain copy": [], "import": [], "export": []}
    peaks = {"plain copy": 0.0}
    steps = {
        "import": ("--hf", tmp_path / "hf", "--output", tmp_path / "checkpoint"),
        "export": ("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "back"),
    }
    for _ in range(3):  # in turn, the best of each: other work on the machine comes and goes
        for verb, arguments in steps.items():
            shutil.rmtree(arguments[-1], ignore_errors=True)
            os.sync()  # what was written before is not to be waited for by what comes now
            times["plain copy"].append(plain_copy(weights, tmp_path / "copy"))
            os.sync()
            seconds, peaks[verb] = convert(verb, *arguments)
            times[verb].append(seconds)
    assert filecmp.cmp(weights, tmp_path / "back" / "model.safetensors", shallow=False)
    with capsys.disabled():
        print(f"\n{size:.2f} GB of random weights, best of 3, written through to the disk:")
        for name, seconds in ((name, min(values)) for name, values in times.items()):
            peak = f", peak memory {peaks[name]:.2f} GB" if peaks[name] else ""
            print(f"  {name:10} {seconds:5.2f} s  {size / seconds:5.2f} GB/s{peak}")


@pytest.mark.long
def test_a_70b_shaped_model_needs_three_times_its_largest_tensor_and_a_gigabyte(tmp_path, capsys):
    sizes = tensor_bytes(SHAPE_OF_70B)
    bound = (3 * max(sizes) + GB) / GB
    need_disk(tmp_path, 3.2 * sum(sizes) / GB)
    make_random(SHAPE_OF_70B, tmp_path / "hf", 2 * GB)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    _, peak_in = convert("import", "--hf", tmp_path / "hf", "--output", checkpoint)
    _, peak_out = convert("export", "--checkpoint", checkpoint, "--output", back)
    with capsys.disabled():
        print(
            f"\n70B-shaped, largest tensor {max(sizes) / GB:.2f} GB, of {sum(sizes) / GB:.1f} GB: "
            f"peak memory of import {peak_in:.2f}, of export {peak_out:.2f}, bound {bound:.2f} GB"
        )
    assert max(sizes) == 2 * 32000 * 8192 and len(sizes) == 9 * 2 + 3
    assert peak_in <= bound and peak_out <= bound
