"""Small scorers and corpora for the tests of frozen scoring."""

import random
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter

VOCAB_SIZE = 90
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "init_method_std": 0.5,  # far from uniform: every loss is different
}


def tokenizer(**changes: Any) -> TokenizerIdentity:
    fields = {
        "kind": "huggingface",
        "path": "a/tokenizer",
        "digest": "0" * 32,
        "vocab_size": VOCAB_SIZE,
        "bos_id": 1,
        "eos_id": 2,
        "add_bos": False,
        "add_eos": False,
    }
    return TokenizerIdentity(**{**fields, **changes})


def write_corpus(prefix: Path, lengths: list[int], seed: int = 0, **changes: Any) -> TokenDataset:
    """Random documents of these lengths; ``changes`` to the tokenizer's identity."""
    draw = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with TokenWriter(str(prefix), tokenizer(**changes)) as writer:
        for length in lengths:
            writer.add(draw.integers(3, VOCAB_SIZE, length))
    return TokenDataset(str(prefix))


def write_checkpoint(folder: Path, seed: int, model: dict[str, Any], **changes: Any) -> None:
    """FOLDER/step_00000000: a random model, as training writes it. Needs a process of its own."""
    import torch

    from lctw_megatron.config.schema import LayoutConfig, ModelConfig
    from lctw_megatron.model.checkpoint import CheckpointManifest, model_state
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize
    from lctw_megatron.training.checkpoint import CheckpointWriter

    config = ModelConfig(**model)
    world = initialize(LayoutConfig(), seed)
    chunks = build_model(
        config,
        LayoutConfig(),
        max_sequence_length=128,
        dtype=torch.float32,
        device=world.device,
        seed=seed,
    )
    identity = tokenizer(**changes).model_dump(mode="json")
    manifest = CheckpointManifest(step=0, model=config, dtype="fp32", tokenizer=identity)
    CheckpointWriter(folder, keep_last=1).save(model_state(chunks), manifest)


def mixed_lengths(count: int, seed: int) -> list[int]:
    """Lengths of documents: some without work, some of many windows."""
    draw = random.Random(seed)
    return [draw.choice([0, 1, 2, 40, 64, 65, 96, 97, draw.randint(1, 900)]) for _ in range(count)]
