"""What a recipe must know about a weighting scheme: its name and what it needs.

weighting/schemes.py has a class for each, which does the arithmetic; a test keeps them equal.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SchemeNeeds:
    short_loss: bool = True
    """Whether training must provide short losses (a sidecar, or self-scoring) at all."""
    parameters: tuple[str, ...] = ()
    """Fields of the `weighting` section that this scheme must have and most others refuse."""


SCHEME_NEEDS: dict[str, SchemeNeeds] = {
    "uniform": SchemeNeeds(short_loss=False),
    "dense": SchemeNeeds(),
    "sparse": SchemeNeeds(parameters=("keep_fraction",)),
    "longce": SchemeNeeds(parameters=("max_weight",)),
    "ppmi": SchemeNeeds(parameters=("keep_fraction", "shift")),
    "npmi": SchemeNeeds(parameters=("keep_fraction", "shift")),
    "rho": SchemeNeeds(parameters=("keep_fraction",)),
    "position": SchemeNeeds(short_loss=False),
    "custom": SchemeNeeds(parameters=("function",)),
}


def needs_short_loss(scheme: str) -> bool:
    """Whether training under ``scheme`` needs short losses. True of a name not known here."""
    return SCHEME_NEEDS.get(scheme, SchemeNeeds()).short_loss
