"""Which megatron-core is installed, asked without importing it or torch."""

from importlib.metadata import version

MEGATRON = tuple(int(part) for part in version("megatron-core").split(".")[:2])
"""(0, 19) for 0.19.2."""
