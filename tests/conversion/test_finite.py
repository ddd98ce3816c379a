"""No conversion makes or hands on weights that are no finite numbers."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lctw_megatron.conversion import hf_safetensors
from lctw_megatron.conversion.finite import check_finite
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.megatron_lm import export_megatron_lm
from lctw_megatron.conversion.megatron_lm_import import import_megatron_lm
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import make_model

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DOWN = "model.layers.1.mlp.down_proj.weight"
NO_NUMBERS = "holds NaN or infinity"
TOO_LARGE = r"has an absolute value of 1e\+06, fp16 ends at 65504; use --dtype fp32 or bf16"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with one value changed, and checkpoints of them."""
    here = tmp_path_factory.mktemp("folders")
    make_model("llama", here / "plain")
    for name, value in {"large": -1e6, "nan": float("nan"), "inf": float("-inf")}.items():
        shutil.copytree(here / "plain", here / name)
        tensors = load_file(here / name / "model.safetensors")
        tensors[DOWN][3, 5] = value
        save_file(tensors, here / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_safetensors, "check_finite", lambda *what: None)
            import_hf(here / name, here / f"{name}_checkpoint", log=lambda line: None)
    import_hf(here / "plain", here / "plain_checkpoint", log=lambda line: None)
    return here


def refused(convert, source: Path, output: Path, dtype: str, named: str) -> str:
    with pytest.raises(InputError, match=named) as caught:
        convert(source, output, dtype)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert not output.exists() and not os.listdir(output.parent)
    return str(caught.value)


@pytest.mark.parametrize("name, dtype, named", [
    ("nan", "keep", NO_NUMBERS), ("inf", "bf16", NO_NUMBERS), ("inf", "fp16", NO_NUMBERS),
    ("large", "fp16", TOO_LARGE),
])  # fmt: skip
def test_an_import_names_tensor_and_file(folders, tmp_path, name, dtype, named):
    text = refused(import_hf, folders / name, tmp_path / "out", dtype, named)
    assert f"{name}/model.safetensors: {DOWN} " in text


@pytest.mark.parametrize("export", [export_hf, export_megatron_lm])
@pytest.mark.parametrize("name, dtype, named", [
    ("nan", "keep", NO_NUMBERS), ("inf", "bf16", NO_NUMBERS), ("large", "fp16", TOO_LARGE),
])  # fmt: skip
def test_an_export_names_the_tensor(folders, tmp_path, name, dtype, named, export):
    text = refused(export, folders / f"{name}_checkpoint", tmp_path / "out", dtype, named)
    assert "checkpoint: decoder.layers.mlp.linear_fc2.weight, layer 1" in text


def test_an_import_from_megatron_lm_names_the_tensor(folders, tmp_path):
    export_megatron_lm(folders / "large_checkpoint", tmp_path / "saved", log=lambda line: None)
    with pytest.raises(InputError, match=f"decoder.layers.mlp.linear_fc2.weight.* {TOO_LARGE}"):
        import_megatron_lm(tmp_path / "saved", folders / "large", tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_what_the_dtype_holds_is_converted(folders, tmp_path):
    import_hf(folders / "large", tmp_path / "in", "bf16", log=lambda line: None)
    export_hf(tmp_path / "in", tmp_path / "out", log=lambda line: None)
    found = load_file(tmp_path / "out" / "model.safetensors")[DOWN][3, 5]
    assert found == torch.tensor(-1e6).to(BF16)
    export_hf(folders / "plain_checkpoint", tmp_path / "half", "fp16", log=lambda line: None)


@pytest.mark.parametrize("size", [1, 3, 8, 100, 1000])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_every_place_of_a_tensor_is_looked_at(size, dtype):
    where = Path("x")
    check_finite(torch.zeros(0, dtype=dtype), dtype, "t", where)
    for at in {0, size // 2, size - 1}:
        for value in (float("nan"), float("inf"), float("-inf")):
            values = torch.randn(size).to(dtype)
            check_finite(values, dtype, "t", where)
            values[at] = value
            with pytest.raises(InputError, match=NO_NUMBERS):
                check_finite(values, dtype, "t", where)


@pytest.mark.parametrize("value, source, target, wider", [
    (65519.9, FP32, FP16, None),  # the last that is rounded down
    (65520.0, FP32, FP16, "fp32 or bf16"),
    (-65536.0, BF16, FP16, "fp32 or bf16"),
    (3.38e38, FP32, BF16, None),
    (3.4e38, FP32, BF16, "fp32$"),
    (3.4e38, FP32, FP32, None),
])  # fmt: skip
def test_a_value_is_refused_if_rounding_makes_it_infinite(value, source, target, wider):
    values = torch.tensor([0.5, value], dtype=source)
    assert bool(values.to(target).isfinite().all()) == (wider is None)
    if wider is None:
        check_finite(values, target, "t", Path("x"))
    else:
        with pytest.raises(InputError, match=f"use --dtype {wider}"):
            check_finite(values, target, "t", Path("x"))
