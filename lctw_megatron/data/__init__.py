"""Corpora, token datasets, sidecars, sequences and the loader. Knows nothing of models."""

from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset

__all__ = ["Sidecar", "TokenDataset"]
