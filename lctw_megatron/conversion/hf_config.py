"""config.json of a Hugging Face folder to our ModelConfig and back.

Reads what transformers 4 and 5 write: `rope_theta` beside `rope_scaling`, or both inside
`rope_parameters`; `torch_dtype` or `dtype`. Writes the form of transformers 4, which 5 reads too.
An option that changes the arithmetic and that our model does not have is an error that names it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lctw_megatron.config.model_sizes import expert_width, head_width
from lctw_megatron.config.rope import check_rope
from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.conversion import dtypes
from lctw_megatron.conversion.architectures import ARCHITECTURES, Llama, Option, architecture
from lctw_megatron.conversion.hf_rope import read_rope, rope_values
from lctw_megatron.conversion.placement import query_groups
from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.data.tokenizer_files import CONFIG, is_token_id
from lctw_megatron.errors import InputError

# Fields that say nothing about the arithmetic of the forward pass, or are read below.
_KNOWN = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id",
    "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "layer_types", "max_position_embeddings", "max_window_layers",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "original_max_position_embeddings", "output_router_logits", "pad_token_id",
    "partial_rotary_factor",
    "pretraining_tp",  # how the matrices were cut in training; the product is the same
    "quantization_config", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "transformers_weights",  # hf_safetensors.py looks at it
    "use_cache", "vocab_size",
}  # fmt: skip

# Options of every architecture. By this one transformers 5 lets tokens see what follows them; a
# null does so in its eager attention, and not in others. By the other it gives layers fields of
# their own.
_SHARED_OPTIONS = {
    "is_causal": Option(True, (True,)),
    "per_layer_config": Option(None, (None, {})),
}


@dataclass(frozen=True)
class HFConfig:
    """What a config.json says."""

    model: ModelConfig
    ignored: list[str]
    """Fields that the architecture does not have, so that transformers ignores them as well."""
    notes: list[str]
    """For the user: what was read over, and what keeps transformers from loading the folder."""


def read_config(folder: Path) -> HFConfig:
    """Read FOLDER/config.json. Raises InputError, naming the field, if it cannot be converted."""
    path = folder / CONFIG
    try:
        values = read_json_object(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: missing; expected a Hugging Face model folder with config.json and "
            "safetensors files"
        ) from None
    table = _table(values, path)
    if "num_moe_experts" in table.experts:  # transformers 5 has one name, 4 two
        number, _ = table.experts["num_moe_experts"]
        names = [name for name in ("num_local_experts", "num_experts") if name in values]
        if len({str(values[name]) for name in names}) > 1:
            raise InputError(
                f"{path}: num_local_experts is {values['num_local_experts']!r:.80}, but "
                f"num_experts is {values['num_experts']!r:.80}; keep one"
            )
        values = {number if name in names else name: value for name, value in values.items()}
    _refuse_unsupported(values, table, path)
    for theirs, _ in table.experts.values():  # some are None in ours, which means another thing
        if values.get(theirs, theirs) is None:
            raise InputError(
                f"{path}: {theirs} is None, expected a value; leave it out for the usual"
            )
    positions = _number(values, "max_position_embeddings", path, table.max_position_embeddings)
    theta, scaling, turned, rope_notes = read_rope(
        values, positions, table.partial_rotary_factor, path, table.rope_theta
    )
    dropouts = {ours: values.get(theirs) or 0.0 for theirs, ours in table.dropouts.items()}
    heads = _number(values, "num_attention_heads", path)
    # A null, unlike nothing, is as many as attention heads to transformers wherever it takes one.
    usual = heads if "num_key_value_heads" in values else table.key_value_heads or heads
    groups = _number(values, "num_key_value_heads", path, usual)
    if heads % groups:
        raise InputError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    hidden = _number(values, "hidden_size", path)
    width = _given(values, "head_dim", table.head_dim)
    if width is None and hidden % heads:
        raise InputError(
            f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and "
            "there is no head_dim"
        )
    try:
        fields = dict(
            architecture=table.model_type,
            num_layers=_number(values, "num_hidden_layers", path),
            hidden_size=hidden,
            ffn_hidden_size=_number(values, "intermediate_size", path),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=_number(values, "head_dim", path, width or hidden // heads),
            vocab_size=_number(values, "vocab_size", path),
            max_position_embeddings=positions,
            rope_theta=theta,
            rope_scaling=scaling,
            partial_rotary_factor=turned,
            layernorm_epsilon=values.get(table.epsilon[0], table.epsilon[1]),
            tie_word_embeddings=_given(values, "tie_word_embeddings", False),
            init_method_std=_given(values, "initializer_range", 0.02),
            **dropouts,
            qkv_bias=table.flags["qkv_bias"],
            qk_norm=table.flags["qk_norm"],
            **{field: values.get(*named) for field, named in table.experts.items()},
        )
        model = ModelConfig.model_validate(fields, strict=True)  # no words for numbers
    except ValidationError as error:
        first = error.errors()[0]
        ours = str(first["loc"][-1])
        raise InputError(
            f"{path}: {_theirs(ours, table)} is {first['input']!r:.80}: {first['msg']}"
        ) from None
    if model.num_moe_experts and model.moe_router_topk > model.num_moe_experts:
        raise InputError(
            f"{path}: {_theirs('moe_router_topk', table)} is {model.moe_router_topk}, expected at "
            f"most {_theirs('num_moe_experts', table)} {model.num_moe_experts}"
        )
    check_rope(model, f"{path}: ")
    return HFConfig(
        model=model,
        ignored=sorted(
            set(values)
            - _KNOWN
            - {*_SHARED_OPTIONS, *table.options, *table.dropouts, table.epsilon[0]}
            - {name for name, _ in table.experts.values()}
        ),
        notes=rope_notes + _notes(values, table, model, path),
    )


def config_values(model: ModelConfig, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """The config.json of ``model`` with weights in ``dtype`` (fp32, bf16 or fp16)."""
    table = architecture(model)
    width = head_width(model)
    if model.max_position_embeddings is None:
        raise InputError("model.max_position_embeddings is not set in the checkpoint's manifest")
    values = model.model_dump() | {"moe_ffn_hidden_size": expert_width(model)}
    return {
        "architectures": [table.hf_class],
        "model_type": table.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": query_groups(model),
        "head_dim": width,
        "hidden_act": table.activations[0],
        "max_position_embeddings": model.max_position_embeddings,
        **rope_values(model),
        table.epsilon[0]: model.layernorm_epsilon,
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.init_method_std,
        **{theirs: _dropout(model, ours) for theirs, ours in table.dropouts.items()},
        "use_cache": True,
        **{name: values[field] for field, (name, _) in table.experts.items()},
        **table.written,
        **token_ids,
        "torch_dtype": dtypes.CONFIG[dtype],
    }


_WINDOW = ("sliding_window", "use_sliding_window", "layer_types")


def _has_idle_window(values: dict[str, Any], table: type[Llama]) -> bool:
    """Whether there is a sliding window that hides nothing: it is as long as the model's positions,
    or begins (`max_window_layers` of the dense Qwens; in transformers' Qwen3MoE it begins in the
    first, whatever that says) above the last layer."""
    option = table.options.get("sliding_window")
    window = values.get("sliding_window", option.default if option else 4096)
    if "use_sliding_window" in table.options:
        used, first = values.get("use_sliding_window"), values.get("max_window_layers", 28)
        layers = values.get("num_hidden_layers")
        above = isinstance(first, int) and isinstance(layers, int) and first >= layers
        if used and above and not table.experts and not values.get("layer_types"):
            return True
    else:
        used = window is not None and option is not None
    positions = values.get("max_position_embeddings") or table.max_position_embeddings
    whole = isinstance(window, int) and isinstance(positions, int)
    return bool(used) and whole and window >= positions


def _notes(values: dict[str, Any], table: type[Llama], model: ModelConfig, path: Path) -> list[str]:
    """See HFConfig. InputError for ids that are none."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if values.get(name) is not None and not is_token_id(values[name]):
            raise InputError(
                f"{path}: {name} is {values[name]!r:.80}, expected a token id, a list of them or "
                "null"
            )
    notes = []
    if kept := [name for name in table.dropouts if values.get(name)]:
        given = ", ".join(f"{name} {getattr(model, table.dropouts[name]):g}" for name in kept)
        fields = " ".join(f"--set model.{table.dropouts[name]}=0" for name in kept)
        notes.append(
            f"{path}: {given}: training drops out, too ({fields} for none); scoring and evaluation "
            "never do"
        )
    if _has_idle_window(values, table):
        notes.append(
            f"{path}: its sliding window hides nothing within max_position_embeddings, and is left "
            "out: in longer contexts, too, tokens see all before them"
        )
    pad, size = values.get("pad_token_id"), model.vocab_size or 0
    if isinstance(pad, int) and not -size <= pad < size:
        notes.append(
            f"{path}: pad_token_id {pad} is beyond the vocabulary of {size}, so transformers loads "
            "neither this folder nor what is exported from it; it needs null there, or more "
            "embeddings"
        )
    return notes


def _table(values: dict[str, Any], path: Path) -> type[Llama]:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{path}: model_type {kind!r} cannot be converted; supported: {known}")
    table = ARCHITECTURES[kind]
    classes = values.get("architectures") or [table.hf_class]
    if classes != [table.hf_class]:
        raise InputError(f"{path}: architectures is {classes}, expected ['{table.hf_class}']")
    return table


def _refuse_unsupported(values: dict[str, Any], table: type[Llama], path: Path) -> None:
    """Name every option that changes the arithmetic in a way our model does not have."""
    found = []
    if values.get("hidden_act", table.activations[0]) not in table.activations:
        found.append(f"hidden_act {values['hidden_act']!r} (supported: {table.activations[0]})")
    if values.get("quantization_config"):
        found.append("quantization_config (supported: float32, bfloat16 and float16 weights)")
    if values.get("auto_map"):
        found.append("auto_map, code of its own (supported: the classes of transformers)")
    window_values = (True, "sliding_attention", values.get("sliding_window"))
    idle = window_values if _has_idle_window(values, table) else ()
    for name, option in (_SHARED_OPTIONS | table.options).items():
        value = values.get(name, option.default)
        for each in value if isinstance(value, list) else [value]:
            if each not in option.supported and not (name in _WINDOW and each in idle):
                origin = "" if name in values else ", transformers' default"
                text = " or ".join("null" if v is None else repr(v) for v in option.supported)
                found.append(f"{name} {each!r}{origin} (supported: {text})")
                break
    if found:
        raise InputError(f"{path}: unsupported: {'; '.join(found)}")


def _theirs(field: str, table: type[Llama]) -> str:
    """config.json's name of ``field`` of ModelConfig."""
    names = {
        "num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size",
        "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim",
        "layernorm_epsilon": table.epsilon[0], "init_method_std": "initializer_range",
    }  # fmt: skip
    names |= {ours: theirs for theirs, ours in table.dropouts.items()}
    names |= {ours: theirs for ours, (theirs, _) in table.experts.items()}
    return names.get(field, field)


def _dropout(model: ModelConfig, name: str) -> float:
    value = getattr(model, name)
    return model.hidden_dropout if value is None else value  # of the embeddings


def _given(values: dict[str, Any], name: str, default: Any) -> Any:
    return default if values.get(name) is None else values[name]


def _number(values: dict[str, Any], name: str, path: Path, default: int | None = None) -> int:
    value = values.get(name)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{path}: {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{path}: {name} is {value!r}, expected a positive whole number")
    return value
