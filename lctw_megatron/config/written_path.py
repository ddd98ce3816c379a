"""A path of a recipe to which something is written."""

import re
from typing import Annotated

from pydantic import AfterValidator

_OF_A_SHELL = re.compile(r"^~[^/]*(?=/|$)|\$\w*[A-Za-z_]\w*|\$\{.*?\}")


def _check_written_out(path: str) -> str:
    """No shell reads a recipe: a folder of that very name would be made in the current one."""
    if found := _OF_A_SHELL.search(path):
        raise ValueError(f"a path written out, as nothing puts {found[0]} in here")
    return path


WrittenPath = Annotated[str, AfterValidator(_check_written_out)]
