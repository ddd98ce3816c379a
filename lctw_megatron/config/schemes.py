"""What a recipe must know about a weighting scheme: its name and what it needs.

weighting/schemes.py has a class for each, which does the arithmetic; a test keeps them equal.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SchemeNeeds:
    short_loss: bool = True
    """Whether training must provide short losses (a sidecar, or self-scoring) at all."""
    long_loss: bool = True
    """Whether the weights depend on the long losses, which training always has."""
    parameters: tuple[str, ...] = ()
    """Fields of the `weighting` section that this scheme must have and most others refuse."""
    optional: tuple[str, ...] = ()
    """Those that it may have and most others refuse."""


SCHEME_NEEDS: dict[str, SchemeNeeds] = {
    "uniform": SchemeNeeds(short_loss=False, long_loss=False),
    "dense": SchemeNeeds(),
    "sparse": SchemeNeeds(parameters=("keep_fraction",)),
    "longce": SchemeNeeds(parameters=("max_weight",), optional=("normalise",)),
    "longppl": SchemeNeeds(optional=("min_difference", "min_log_probability")),
    "ppmi": SchemeNeeds(parameters=("keep_fraction", "shift")),
    "npmi": SchemeNeeds(parameters=("keep_fraction", "shift")),
    "rho": SchemeNeeds(parameters=("keep_fraction",)),
    "eslm": SchemeNeeds(short_loss=False, parameters=("keep_fraction",)),
    "position": SchemeNeeds(short_loss=False, long_loss=False),
    "custom": SchemeNeeds(parameters=("function",), optional=("normalise",)),
}


def needs_short_loss(scheme: str) -> bool:
    """Whether training under ``scheme`` needs short losses. True of a name not known here."""
    return SCHEME_NEEDS.get(scheme, SchemeNeeds()).short_loss
