"""Is a checkpoint the same model as a Hugging Face folder? Every tensor, and what both compute."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lctw_megatron.config.model_sizes import expert_width, head_width
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion import dtypes
from lctw_megatron.conversion.checkpoint_reader import CheckpointReader, open_checked
from lctw_megatron.conversion.fused_experts import split_fused
from lctw_megatron.conversion.hf_config import read_config
from lctw_megatron.conversion.hf_import import check_tensors, largest_bytes, read_stored
from lctw_megatron.conversion.hf_safetensors import SafetensorsFolder, tensor_of
from lctw_megatron.conversion.placement import (
    StoredTensor,
    query_groups,
    stored_tensors,
)
from lctw_megatron.errors import InputError, one_line
from lctw_megatron.model.checkpoint import read_manifest
from lctw_megatron.progress import Progress

# Fields of ModelConfig that config.json has not, or that matter in training only.
_NOT_COMPARED = {
    "hidden_dropout", "attention_dropout", "embedding_dropout", "attention", "init_method_std",
    "moe_aux_loss_coeff",
}  # fmt: skip


@dataclass
class Comparison:
    """All layers of one checkpoint tensor against the Hugging Face tensors in it."""

    key: str
    tensors: int = 0
    elements: int = 0
    different: int = 0
    """Elements that are not the same bit for bit."""
    largest: float = 0.0
    """Largest absolute difference; infinite where only one side is a number."""


@dataclass(frozen=True)
class LogitsComparison:
    tokens: int
    largest: float
    """Largest absolute difference between the two models' logits."""
    same_choice: float
    """Share of positions with the same most likely token."""


def config_differences(hf: Path, checkpoint: Path) -> list[str]:
    """`field: folder's value, checkpoint's value` of every field of the model that differs."""
    theirs, ours = _normal(read_config(hf).model), _normal(read_manifest(checkpoint).model)
    return [
        f"{name}: {theirs.get(name)} in the folder, {ours.get(name)} in the checkpoint"
        for name in theirs | ours
        if theirs.get(name) != ours.get(name)
    ]


def compare_tensors(hf: Path, checkpoint: Path) -> list[Comparison]:
    """Compare every tensor of two folders with the same configuration, streamed.

    Where the dtypes differ the wider side is first rounded to the narrower, which is what a
    conversion does. Raises InputError for missing, unknown and wrongly shaped tensors.
    """
    model = read_config(hf).model
    tensors = list(stored_tensors(model))
    reader = open_checked(checkpoint)
    reader.check(tensors)
    results: dict[str, Comparison] = {}
    with SafetensorsFolder(hf) as source:
        check_tensors(source, model, tensors)
        size = largest_bytes(tensors, torch.float32)
        memory = [np.empty(size, np.uint8) for _ in range(2)]
        with Progress("compare", len(tensors), "tensors") as progress:
            for stored in tensors:
                result = results.setdefault(stored.key, Comparison(stored.key))
                _compare(source, reader, stored, memory, result)
                progress.update()
    return list(results.values())


def _compare(
    source: SafetensorsFolder,
    reader: CheckpointReader,
    stored: StoredTensor,
    memory: list[np.ndarray],
    result: Comparison,
) -> None:
    """Add one stored tensor to ``result``."""
    ours = reader.read(stored, memory[0])
    dtype = ours.dtype
    for part in stored.parts:
        dtype = dtypes.narrower(dtype, source.dtype(part.name))
    theirs = tensor_of(memory[1], dtype, stored.shape)
    read_stored(source, stored, theirs)
    live = stored.covered_rows
    a, b = ours[:live].to(dtype), theirs[:live]
    result.tensors += len(stored.parts)
    result.elements += a.numel()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    differs = a.view(bits) != b.view(bits)
    if different := int(differs.sum()):
        gap = (a[differs].float() - b[differs].float()).abs().nan_to_num(math.inf).max()
        result.different += different
        result.largest = max(result.largest, float(gap))


def compare_logits(hf: Path, checkpoint: Path, tokens: Tensor) -> LogitsComparison:
    """Run both models in float32 on ``tokens`` (int64 [sequences, length]), the weights of both
    rounded to the narrower dtype of the two, as compare_tensors does. InputError for a token that
    the model does not have."""
    manifest = read_manifest(checkpoint)
    size = manifest.model.vocab_size or 0
    if wrong := [token for token in tokens.flatten().tolist() if not 0 <= token < size]:
        raise InputError(f"token id {wrong[0]}: {checkpoint} has a vocabulary of {size}")
    rounded_to = dtypes.TORCH[manifest.dtype]
    with SafetensorsFolder(hf) as source:
        tensors = list(stored_tensors(read_config(hf).model))
        split_fused(source.entries, tensors)
        for stored in tensors:
            for part in stored.parts:
                rounded_to = dtypes.narrower(rounded_to, source.dtype(part.name))
    theirs = hf_logits(hf, tokens, rounded_to)
    ours = megatron_logits(checkpoint, tokens, rounded_to)
    return LogitsComparison(
        tokens=tokens.numel(),
        largest=float((ours - theirs).abs().nan_to_num(math.inf).max()),
        same_choice=float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    )


@torch.no_grad()
def hf_logits(hf: Path, tokens: Tensor, rounded_to: torch.dtype = torch.float32) -> Tensor:
    """float32 logits [sequences, length, vocabulary] of transformers, weights rounded first.
    InputError if transformers cannot load the folder."""
    from transformers import AutoModelForCausalLM, __version__

    from lctw_megatron.platform.world import default_device

    dtype = "dtype" if int(__version__.split(".")[0]) >= 5 else "torch_dtype"  # renamed in 5
    try:
        # return_dict: a config.json may say false, by which transformers' own forward ends in 5.
        model = AutoModelForCausalLM.from_pretrained(hf, return_dict=True, **{dtype: rounded_to})
    except Exception as error:  # whatever its classes raise
        raise InputError(
            f"{hf}: transformers cannot load it ({one_line(error)}), so there are no logits to "
            "compare; mend the folder, or compare the tensors alone with --no-logits"
        ) from None
    model = model.float().to(default_device()).eval()
    return model(tokens.to(default_device()), use_cache=False).logits.float().cpu()


@torch.no_grad()
def megatron_logits(
    checkpoint: Path, tokens: Tensor, rounded_to: torch.dtype = torch.float32
) -> Tensor:
    """float32 logits [sequences, length, vocabulary] of our model, on one rank, weights rounded
    first."""
    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.model.checkpoint import load_weights
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize, shut_down

    model = read_manifest(checkpoint).model.model_copy(update={"attention": "sdpa"})
    alone = not torch.distributed.is_initialized()
    world = initialize(LayoutConfig(), seed=1)
    try:
        chunks = build_model(
            model,
            LayoutConfig(),
            max_sequence_length=tokens.shape[1],
            dtype=torch.float32,
            device=world.device,
            seed=None,
        )
        load_weights(chunks, checkpoint)
        for parameter in chunks[0].parameters():
            parameter.copy_(parameter.to(rounded_to))
        place = tokens.to(world.device)
        positions = torch.arange(tokens.shape[1], device=world.device).expand_as(place)
        logits = chunks[0].eval()(place, positions, None)
        return logits[..., : model.vocab_size].float().cpu()
    finally:
        if alone:
            shut_down()


def tensor_table(results: list[Comparison]) -> str:
    """One line for every checkpoint tensor and one for all of them."""
    total = Comparison(
        "all",
        sum(result.tensors for result in results),
        sum(result.elements for result in results),
        sum(result.different for result in results),
        max(result.largest for result in results),
    )
    width = max(len(result.key) for result in results)
    lines = [
        f"{'tensor':{width}}  {'HF tensors':>10}  {'elements':>14}  {'different':>12}  largest"
    ]
    for result in [*results, total]:
        mark = f"{result.largest:.1e}  DIFFERENT" if result.different else "0"
        lines.append(
            f"{result.key:{width}}  {result.tensors:>10,}  {result.elements:>14,}  "
            f"{result.different:>12,}  {mark}"
        )
    return "\n".join(lines)


def logits_table(result: LogitsComparison, tolerance: float) -> str:
    verdict = "equal" if result.largest <= tolerance else "DIFFERENT"
    return (
        f"logits of {result.tokens} tokens in float32: largest difference {result.largest:.1e} "
        f"(tolerance {tolerance:g}), same most likely token at {100 * result.same_choice:.2f} % of "
        f"the positions: {verdict}"
    )


def _normal(model: ModelConfig) -> dict[str, object]:
    """All that decides the arithmetic and the shapes, defaults filled in."""
    values = model.model_dump(exclude=_NOT_COMPARED)
    scaling = values.pop("rope_scaling") or {}
    return values | {
        **{f"rope_scaling.{name}": value for name, value in scaling.items()},
        # In the digits of float32, through which 1e-05 went on its way into some configs.
        "layernorm_epsilon": float(f"{model.layernorm_epsilon:.7g}"),
        "num_query_groups": query_groups(model),
        "kv_channels": head_width(model),
        "moe_ffn_hidden_size": expert_width(model),
    }
