"""The user's own function behind the scheme `custom`: found, tried and its answer checked."""

from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

from torch import Tensor

from lctw_megatron.errors import InputError


def call(path: str, long_loss: Tensor, short_loss: Tensor, live: Tensor) -> Tensor:
    """Its weights, [sequences, targets] as the arguments. Raises InputError if it fails, or returns
    another shape or, where ``live`` (bool), what is no weight."""
    # Copies, as it may work in place: on the losses that are trained on, else.
    given = long_loss.clone(), short_loss.clone(), live.clone()
    try:
        result = import_function(path)(*given)
    except Exception as error:
        raise InputError(
            f"weighting.function {path} failed: {type(error).__name__}: {error}; "
            "--debug shows where"
        ) from error
    shape = tuple(live.shape)
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise InputError(
            f"weighting.function {path} returned {found}, expected a tensor of shape {shape}: one "
            "weight a target"
        )
    result = result.to(long_loss.dtype)  # in which a large float64 is infinite
    if not (~live | ((result >= 0) & result.isfinite())).all():
        raise InputError(
            f"weighting.function {path} returned a weight that is negative, infinite or NaN; "
            "weights are finite and at least 0"
        )
    return result


@cache
def import_function(path: str) -> Any:
    """What `package.module:function` names. Raises InputError: there is none, or it does not take
    (long_loss, short_loss, mask)."""
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        raise InputError(f"weighting.function is {path!r}, expected `package.module:function`")
    try:
        function = getattr(import_module(module), name)
    except ImportError as error:
        raise InputError(
            f"weighting.function {path}: {error}; is its folder on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise InputError(f"weighting.function {path}: {module} has no {name}") from error
    except Exception as error:  # whatever a module does while it is imported
        raise InputError(
            f"weighting.function {path}: importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise InputError(f"weighting.function {path}: {name} is not a function")
    try:
        signature(function).bind(None, None, None)
    except (TypeError, ValueError) as error:  # ValueError: some builtins tell no signature
        raise InputError(
            f"weighting.function {path}: cannot be called as {name}(long_loss, short_loss, mask): "
            f"{error}"
        ) from error
    return function
