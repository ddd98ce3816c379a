"""Fixtures of these tests."""

from tests.scoring.scene import checkpoint, copy, other_checkpoint, scene

__all__ = ["checkpoint", "copy", "other_checkpoint", "scene"]
