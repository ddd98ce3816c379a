"""Small token datasets and sidecars for the tests of sequences and loader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.sidecar import SidecarWriter
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter

VOCAB_SIZE = 1_000_000


def write_tokens(
    prefix: Path | str, documents: Sequence[Sequence[int]], **tokenizer: Any
) -> TokenDataset:
    """A token dataset of these documents; ``tokenizer`` changes fields of its identity."""
    identity = {
        "kind": "huggingface",
        "path": "a/tokenizer",
        "digest": "0" * 32,
        "vocab_size": VOCAB_SIZE,
        "bos_id": None,
        "eos_id": None,
        "add_bos": False,
        "add_eos": False,
    }
    with TokenWriter(str(prefix), TokenizerIdentity(**{**identity, **tokenizer})) as writer:
        for document in documents:
            writer.add(np.array(document))
    return TokenDataset(str(prefix))


def count_up(lengths: Sequence[int]) -> list[list[int]]:
    """Documents in which token t of document d is 1000·(d+1) + t: every token says where it is."""
    return [[1000 * (number + 1) + t for t in range(n)] for number, n in enumerate(lengths)]


def write_sidecar(dataset: TokenDataset, values: Sequence[Sequence[float]], **details: Any) -> None:
    """The short_loss sidecar of ``dataset``, made with window 3, stride 2 and ``details``."""
    made_with = {
        "window": 3,
        "stride": 2,
        "sequence_length": None,
        "score_first_window": False,
        "min_context": 1,
        "mean_context": 1.5,
        "scorer": {"checkpoint": "a/scorer", "digest": "1" * 32},
    }
    with SidecarWriter(dataset, "short_loss", **{**made_with, **details}) as writer:
        for document in values:
            writer.add(np.array(document, dtype=np.float32))
