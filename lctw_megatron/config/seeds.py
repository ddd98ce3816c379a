"""One run, made once with each of several seeds."""

from copy import deepcopy
from typing import Any

from lctw_megatron.errors import InputError, few


def one_a_seed(runs: dict[str, dict[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """``runs`` with those that have ``seeds`` made once for each, as NAME-seed1 and so on.

    InputError, saying ``where``, for a seed given twice and for two runs of one name.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, values in runs.items():
        seeds = values.pop("seeds", None) or []
        copies = {f"{name}-seed{seed}": {**deepcopy(values), "seed": seed} for seed in seeds}
        if len(copies) < len(seeds):
            raise InputError(f"{where}: runs.{name}: seeds {few(seeds)} name one twice")
        for each, complete in (copies or {name: values}).items():
            if each in result:
                raise InputError(f"{where}: two runs are named {each}; rename one of them")
            result[each] = complete
    return result


def replace_seeds(run: dict[str, Any], changes: dict[str, Any], where: str) -> None:
    """Let one `seed` in ``changes`` take the place of several in ``run``. InputError, saying
    ``where``, if they name both."""
    if "seed" in changes and changes.get("seeds"):
        raise InputError(f"{where}: seed and seeds are both given; keep one of them")
    if "seed" in changes and "seeds" not in changes:
        run.pop("seeds", None)
