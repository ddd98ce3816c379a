"""What weight files hold beside weights is known by its content, under any name, and said."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.verify import compare_tensors
from lctw_megatron.errors import InputError
from tests.conversion.hf_models import make_model

WIDTH, THETA, LENGTH = 20, 5e5, 48
INVERSE = 1.0 / THETA ** (torch.arange(0, WIDTH, 2).float() / WIDTH)
ANGLES = torch.outer(torch.arange(LENGTH).float(), INVERSE).repeat(1, 2)
LOWER = torch.ones(LENGTH, LENGTH).tril()

BUFFERS: dict[str, Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": INVERSE,
    "model.rotary_emb.inv_freq": INVERSE.half(),
    "transformer.h.3.attn.rotary_emb.inv_freq": INVERSE.bfloat16(),
    "rope.freqs": INVERSE.bfloat16(),
    "inv_freq": INVERSE.double(),
    "model.layers.1.self_attn.rotary_emb.cos_cached": ANGLES.cos()[None, None],
    "model.layers.1.self_attn.rotary_emb.sin_cached": ANGLES.sin().half(),
    "model.layers.0.self_attn.bias": LOWER.bool()[None, None],
    "transformer.h.0.attn.bias": LOWER.to(torch.uint8)[None, None],
    "attention.mask": LOWER,
    "causal_mask": torch.full((LENGTH, LENGTH), float("-inf")).triu(1),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
    "attn.masked_bias": torch.tensor([-1e9]),
    "model.embeddings.position_ids": torch.arange(LENGTH)[None],
}
WEIGHTS: dict[str, Tensor] = {
    "inv_freq": INVERSE * 1.01,
    "model.layers.0.self_attn.rotary_emb.inv_freq": INVERSE[:-1].clone(),
    "rope.freqs": 1.0 / 1e4 ** (torch.arange(0, WIDTH, 2).float() / WIDTH),
    "model.layers.0.self_attn.bias": LOWER.flip(0).contiguous(),
    "attention.mask": LOWER * 0.5,
    "logit_scale": torch.tensor(2.5),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-3.0),
    "model.layers.0.mlp.gate": torch.zeros(WIDTH // 2),
    "square": torch.zeros(LENGTH, LENGTH),
    "empty": torch.zeros(0),
    "eight": torch.zeros(WIDTH // 2).to(torch.float8_e4m3fn),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("weightless") / "hf")


def with_tensors(plain: Path, folder: Path, more: dict[str, Tensor]) -> Path:
    shutil.copytree(plain, folder)
    path = folder / "model.safetensors"
    save_file(load_file(path) | more, path, {"format": "pt"})
    return folder


def test_buffers_are_left_out_with_a_line_and_change_nothing(plain: Path, tmp_path: Path) -> None:
    hf = with_tensors(plain, tmp_path / "hf", BUFFERS)
    lines: list[str] = []
    import_hf(hf, tmp_path / "checkpoint", log=lines.append)
    (line,) = [line for line in lines if line.startswith(f"{hf}: hold no weights, left out: ")]
    assert "and 12 more" in line
    for folder in (hf, plain):
        compared = compare_tensors(folder, tmp_path / "checkpoint")
        assert all(result.different == 0 for result in compared)


def test_transformers_reads_them_over_too(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf = with_tensors(plain, tmp_path / "hf", BUFFERS)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (plain, hf))
    for (name, one), (other_name, other) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other)


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_has_such_a_name_or_form_but_another_content_is_refused(
    plain: Path, tmp_path: Path, name: str
) -> None:
    hf = with_tensors(plain, tmp_path / "hf", {name: WEIGHTS[name]})
    frequencies = name.endswith(("inv_freq", "freqs"))
    said = "does not follow from rope_theta 500000" if frequencies else "is unknown"
    with pytest.raises(InputError, match=f"{name} {said}"):
        import_hf(hf, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["llama31_tied", "llama_linear", "llama_yarn", "qwen2_dynamic"])
def test_scaled_frequencies_are_known_as_well(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = make_model(name, tmp_path / "plain")
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(hf))
    cosines, _ = rotary(torch.zeros(1), torch.arange(32)[None])  # times yarn's attention factor
    stored = {
        "a.inv_freq": rotary.inv_freq,
        "b.inv_freq": rotary.inv_freq.half(),
        "c.cos_cached": cosines,
    }
    import_hf(with_tensors(hf, tmp_path / "hf", stored), tmp_path / "checkpoint")
