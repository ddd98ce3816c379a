"""A result that is there, and was measured in another way: it is replaced, and that is said."""

from pathlib import Path
from typing import Any

from lctw_megatron.errors import few


def still_holds(
    output: str | Path, before: dict[str, Any] | None, settings: dict[str, Any]
) -> bool:
    """Whether the settings of the result in ``output`` are ``settings``; None: there is none."""
    changed = [name for name, value in settings.items() if (before or {}).get(name) != value]
    if before is not None and changed:
        print(f"{output}: was measured with another {few(changed)}, is replaced", flush=True)
    return before is not None and not changed
