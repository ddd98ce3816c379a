"""From two losses a token to one weight a token: pure tensor functions, no Megatron, no files.

``parse_weighting`` turns the `weighting` section of a recipe into a scheme with its parameters;
``compute_weights`` applies it to a batch of losses. Begin reading with ``schemes.py``.
"""

from lctw_megatron.weighting.compute import compute_weights
from lctw_megatron.weighting.parse import parse_weighting

__all__ = ["compute_weights", "parse_weighting"]
