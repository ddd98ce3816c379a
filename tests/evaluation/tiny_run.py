"""A tiny corpus of words: tokenizer, token datasets, sidecars, and a run trained on them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceTrainer

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.data.sidecar import SidecarWriter
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.data.tokenizers import load_tokenizer

SEQUENCE, WINDOW, STRIDE = 64, 16, 8
VOCABULARY = 200

NOUNS = ("house", "garden", "letter", "morning", "friend", "river", "window", "candle", "road")
VERBS = ("saw", "lost", "found", "wrote", "opened", "followed", "remembered", "painted")

MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}


def make_text(seed: int, words: int) -> str:
    """Sentences with a name that returns far apart."""
    draw = random.Random(seed)
    name = f"Mr. {draw.choice('ABCDEFG')}{draw.choice(['ard', 'ember', 'oton', 'ülich'])}"
    sentences = []
    while sum(len(sentence.split()) for sentence in sentences) < words:
        who = name if draw.random() < 0.2 else "the " + draw.choice(NOUNS)
        sentences.append(f"{who} {draw.choice(VERBS)} the <{draw.choice(NOUNS)}> & left.\n")
    return " ".join(sentences)


def make_data(folder: Path) -> tuple[str, str]:
    """Prefixes of a training and a validation dataset; the first has both sidecars."""
    texts = [make_text(seed, 100 + 40 * (seed % 5)) for seed in range(24)]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(texts))
    SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spm"), vocab_size=VOCABULARY,
        byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(folder / "spm.model")
    prefixes = []
    for name, part in (("train", texts[:16]), ("validation", texts[16:])):
        prefix = str(folder / name)
        with TokenWriter(prefix, tokenizer.identity) as writer:
            for document in tokenizer.encode_documents(part):
                writer.add(document)
        prefixes.append(prefix)
    for name, scale in (("short_loss", 3.0), ("long_loss", 2.0)):
        write_sidecar(TokenDataset(prefixes[0]), name, scale)
    return prefixes[0], prefixes[1]


def write_sidecar(dataset: TokenDataset, name: str, scale: float, **changes: Any) -> None:
    """Random losses around ``scale``; without the first window for short_loss."""
    rng = np.random.default_rng(len(name))
    details = {
        "window": WINDOW if name == "short_loss" else SEQUENCE,
        "stride": STRIDE,
        "sequence_length": None,
        "score_first_window": name != "short_loss",
        "min_context": 1,
        "mean_context": 9.0,
        "scorer": {},
    }
    with SidecarWriter(dataset, name, **{**details, **changes}) as writer:
        for length in dataset.lengths:
            values = rng.gamma(2.0, scale / 2, length).astype(np.float32)
            values[: WINDOW if name == "short_loss" else 1] = np.nan
            writer.add(values)


def make_run(folder: Path, train: str, validation: str, **changes: Any) -> RunConfig:
    """A run of four steps; ``changes`` replace sections."""
    values = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "data": {"train": train, "validation": validation, "sequence_length": SEQUENCE},
        "model": MODEL,
        "weighting": {"scheme": "dense", "interpolation": 0.2},
        "training": {
            "steps": 4,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "warmup_steps": 1,
            "eval_interval": 2,
            "eval_sequences": 4,
            "tensorboard": False,
        },
    }
    return RunConfig.model_validate({**values, **changes})
