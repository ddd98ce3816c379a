"""What a sidecar may be called."""

import re

NAME_RULE = "letters, digits, _ and -, as it becomes part of file names"


def is_sidecar_name(name: str) -> bool:
    """Without a dot: PREFIX.v2 is another dataset's prefix, and PREFIX.v2.short_loss a sidecar of
    that."""
    return re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
