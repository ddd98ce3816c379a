"""What is asked of the machine: once, in one line, and never at the price of an import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.errors import InputError
from lctw_megatron.model import spec
from lctw_megatron.platform import capabilities as module
from lctw_megatron.platform.capabilities import Capabilities, capabilities
from tests.training.layouts import MODEL

HERE = capabilities()


def fresh(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """The machine is another one for this test."""
    found = Capabilities(**{**vars(HERE), **changes})
    for place in (module, spec):
        monkeypatch.setattr(place, "capabilities", lambda: found)


def test_the_module_prints_versions_and_devices_for_a_bug_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lctw_megatron"], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert lines[0] == f"lctw-megatron {HERE.lctw_megatron}"
    assert f"torch {torch.__version__}" in lines
    assert any(line.startswith("TransformerEngine ") for line in lines)
    assert ", ".join(lines) == HERE.line()


BROKEN = """
import json, sys
sys.path.insert(0, {folder!r})
import torch
torch.cuda.is_available = lambda: {gpu}
torch.cuda.device_count = lambda: 1
torch.cuda.nccl.version = lambda: (2, 27, 3)
from lctw_megatron.platform.capabilities import capabilities
here = capabilities()
import megatron.core.models.gpt.gpt_layer_specs as layers
print(json.dumps([here.transformer_engine, here.transformer_engine_error, layers.HAVE_TE]))
"""


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    "code", ["raise OSError('libtransformer_engine.so: cannot open')", "import no_such_module"]
)
def test_a_transformer_engine_that_cannot_be_imported_breaks_nothing(
    code: str, gpu: bool, tmp_path: Path
) -> None:
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(code + "\n")
    script = BROKEN.format(folder=str(tmp_path), gpu=gpu)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, error, known = json.loads(result.stdout)
    assert version is None and known is False
    assert (error is not None) == gpu


def test_attention_te_without_a_usable_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig.model_validate(MODEL | {"attention": "te"})
    for changes, reason in [
        ({"gpu": False}, "there is no GPU that torch can use"),
        ({"gpu": True}, "it is not installed"),
        ({"gpu": True, "transformer_engine_error": "OSError: no libfoo"}, "OSError: no libfoo"),
    ]:
        fresh(monkeypatch, **changes)
        with pytest.raises(InputError, match=reason):
            spec.uses_transformer_engine(model, torch.bfloat16)
    fresh(monkeypatch, gpu=True, transformer_engine="2.20.2")
    assert spec.uses_transformer_engine(model, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "packed", "own"),
    [
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, True),
        (torch.float32, False, True),
    ],
)
def test_float32_and_packed_sequences_take_our_core_attention_inside_transformer_engines_layers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packed: bool, own: bool
) -> None:
    fresh(monkeypatch, gpu=True, transformer_engine="2.20.2")
    model = ModelConfig.model_validate(MODEL)
    assert spec.has_own_core_attention(model, dtype, packed) is own
    # It multiplies float32 in TF32.
    assert spec.uses_transformer_engine(model, dtype) is (dtype == torch.bfloat16)


VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@pytest.mark.parametrize(
    ("values", "backend"),
    [
        ((None, None, None), "auto"),
        (("1", "1", "1"), "auto"),
        (("1", "0", None), "flash"),
        ((None, "0", None), "flash"),
        (("0", None, None), "fused"),
        (("0", "0", None), "unfused"),
        (("0", "0", "0"), None),
        (("1", "1", "0"), None),
    ],
)
def test_a_users_attention_variables_act_or_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str | None, ...], backend: str | None
) -> None:
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if backend is None:
        with pytest.raises(InputError, match="NVTE_FLASH_ATTN=") as error:
            spec._attention_backend()
        assert "\n" not in str(error.value)
    else:
        assert spec._attention_backend().name == backend
