"""What the server of fork_server.py imports once for all its processes."""

import importlib.util
from pathlib import Path

import torch.distributed  # noqa: F401
from megatron.core import dist_checkpointing  # noqa: F401

from lctw_megatron.conversion import hf_export, hf_import  # noqa: F401
from lctw_megatron.scoring import score_corpus, scorer  # noqa: F401
from lctw_megatron.training import checkpoint, loop  # noqa: F401

_PATH = Path(__file__).parents[1] / "tools" / "score.py"
_SPEC = importlib.util.spec_from_file_location("score_tool", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
_TOOL = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TOOL)
score_main = _TOOL.main
