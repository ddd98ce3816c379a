"""Corpora of which every token says where it is, and Megatron's datasets of them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about accelerators that a CPU has no use for
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from tests.data.small_data import write_sidecar, write_tokens

SEQUENCE, WINDOW = 32, 7
EOD = 0
NAN = float("nan")


class Tokenizer:
    """What GPTDataset asks a tokenizer."""

    vocab_size, eod, eos, pad = 1_000_000, EOD, EOD, -7
    unique_identifiers = {"class": "numbers"}


def write_corpus(prefix: Path, lengths: list[int], first: int, **details: Any) -> dict[int, int]:
    """Documents that count on from ``first`` and end with EOD; the short loss of token t is
    t + 0.5, NaN for some. Token -> how many tokens of its document precede it;
    not the EOD's."""
    documents, losses, place = [], [], {}
    for length in lengths:
        document = [*range(first, first + length - 1), EOD]
        place |= {token: t for t, token in enumerate(document[:-1])}
        # EOD says nothing about where it is, so its loss tells: minus nothing, of its document.
        values = [NAN, *(token + 0.5 for token in document[1:-1]), first + length - 1.5]
        documents.append(document)
        losses.append([NAN if t % 11 == 3 else value for t, value in enumerate(values)])
        first += length
    dataset = write_tokens(prefix, documents)
    write_sidecar(dataset, losses, window=WINDOW, stride=3, **details)
    return place


def build(cls: type, prefixes: list[str], folder: Path, samples: int, **changes: Any) -> list[Any]:
    """Training, validation and test dataset of a blend, as pretrain_gpt.py builds them."""
    values: dict[str, Any] = {
        "random_seed": 3, "sequence_length": SEQUENCE, "split": "80,20,0",
        "blend": (prefixes, [0.3 + 0.4 * n for n in range(len(prefixes))]),
        "path_to_cache": str(folder / "cache"), "tokenizer": Tokenizer(),
        "reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False,
        "create_attention_mask": False, "mmap_bin_files": True,
    } | changes  # fmt: skip
    config = GPTDatasetConfig(**values)
    return BlendedMegatronDatasetBuilder(cls, [samples, 20, 0], lambda: True, config).build()


def expected_losses(text: np.ndarray, place: dict[int, int], first_window: bool) -> np.ndarray:
    """float [S] from the S + 1 tokens of a sample alone: the short loss of every label."""
    losses, start = [], 0
    for at in range(1, len(text)):
        before, token = int(text[at - 1]), int(text[at])
        if before == EOD:  # a document begins
            start = at
            losses.append(NAN)
            continue
        begins = place[int(text[start])] if int(text[start]) != EOD else None
        assert begins is not None
        here = begins + at - start  # in its document
        usable = at - start >= WINDOW or (first_window and begins == 0)
        value = (token if token != EOD else before + 1) + 0.5 - (token == EOD)
        losses.append(value if usable and here % 11 != 3 else NAN)
    return np.array(losses, dtype=np.float32)
