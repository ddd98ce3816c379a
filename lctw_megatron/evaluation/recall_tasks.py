"""What is hidden in a long text and asked for at its end: the texts of the recall probes.

The families are those by which the field measures long contexts (needles in a haystack, key-value
retrieval, tracing of variables, aggregation; e.g. Hsieh et al., "RULER", COLM 2024), in words and
with data of our own. Pure text: ``recall_samples.py`` makes tokens of it.

Every text begins with a space (code: a newline) and ends without one, so that no token reaches over
the joint of two texts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle
from typing import Any, get_args

import numpy as np

from lctw_megatron.config.schema import RecallTask

_ADJECTIVES = (
    "amber ancient bitter bright bronze calm clever copper crimson dusty early empty gentle golden "
    "green hidden hollow icy late little marble narrow northern pale quiet rapid silver southern "
    "steep velvet wild wooden"
)
_NOUNS = (
    "anchor apple basket bell bridge candle canyon castle cloud desert falcon forest garden harbor "
    "island kettle ladder lantern meadow mirror mountain orchard palace pepper pocket rabbit river "
    "rocket saddle shadow temple thunder ticket tiger tunnel turtle valley violin wagon window"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
SENTENCES = (
    " The kettle stands on the stove.",
    " A dog sleeps beside the open door.",
    " Somebody has left a book on the table.",
    " Outside the rain has almost stopped.",
    " The clock in the hall strikes four.",
    " Two children look for their boots.",
    " Bread and cheese lie on a blue plate.",
    " The train to the coast is late again.",
    " A neighbour waters her flowers.",
    " The letter will arrive on Monday.",
)
"""The haystack that is always long enough: these again and again."""

OTHER_KEYS = 7
VALUES = 3
HOPS = 3
OTHER_CHAINS = 2
_ASKED_WORDS = 3
_OTHER_WORDS = 6

Part = tuple[str, bool]
"""A piece of the tail, and whether it is an answer."""


@dataclass(frozen=True)
class Story:
    """A sample before it has a length."""

    pieces: list[tuple[float, str]]
    """What is hidden: its place in the filler, from 0 to 1, and the text."""
    tail: list[Part]
    """The question with its answers."""
    filler: Iterator[str] | None = None
    """What the task itself fills the length with; None: the haystack."""
    opening: str = ""
    """Stands before the filler."""


def one_key(rng: np.random.Generator, depth: float) -> Story:
    (key,), (value,) = _keys(rng, 1), _numbers(rng, 1)
    return Story([(depth, _states(key, value))], _asks([(key, value)]))


def multi_key(rng: np.random.Generator, depth: float) -> Story:
    """The other keys share a word with the one that is asked for."""
    adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    nouns = [word for word in NOUNS if word != noun]
    adjectives = [word for word in ADJECTIVES if word != adjective]
    half = OTHER_KEYS // 2
    others = [f"{adjective} {word}" for word in rng.choice(nouns, half, replace=False)]
    rest = rng.choice(adjectives, OTHER_KEYS - half, replace=False)
    others += [f"{word} {noun}" for word in rest]
    value, *wrong = _numbers(rng, 1 + OTHER_KEYS)
    pieces = [(depth, _states(f"{adjective} {noun}", value))]
    pieces += [(float(rng.random()), _states(k, v)) for k, v in zip(others, wrong, strict=True)]
    return Story(pieces, _asks([(f"{adjective} {noun}", value)]))


def multi_value(rng: np.random.Generator, depth: float) -> Story:
    (key,), values = _keys(rng, 1), _numbers(rng, VALUES)
    pieces = [
        (place, f" One access number of the {key} is {value}.")
        for place, value in zip(_spread(depth, VALUES), values, strict=True)
    ]
    question = (
        f" Question: What are the {VALUES} access numbers of the {key}, in the order of the text? "
        f"Answer: The access numbers of the {key} are"
    )
    return Story(pieces, [(question, False), *_listed(values)])


def multi_query(rng: np.random.Generator, depth: float) -> Story:
    pairs = list(zip(_keys(rng, VALUES), _numbers(rng, VALUES), strict=True))
    pieces = [
        (place, _states(*pair)) for place, pair in zip(_spread(depth, VALUES), pairs, strict=True)
    ]
    return Story(pieces, _asks([pairs[i] for i in rng.permutation(VALUES)]))


def variables(rng: np.random.Generator, depth: float) -> Story:
    """Chains of assignments in the order of the text; the end of the first one is asked for."""
    names = [str(word) for word in rng.permutation(NOUNS)]
    values = _numbers(rng, 1 + OTHER_CHAINS)
    pieces: list[tuple[float, str]] = []
    for chain, value in enumerate(values):
        own = names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)]
        places = _spread(depth, HOPS + 1) if chain == 0 else sorted(rng.random(HOPS + 1).tolist())
        sources = [value, *(f"the value of {name}" for name in own[:-1])]
        pieces += [
            (place, f" Let the value of {name} be {source}.")
            for place, name, source in zip(places, own, sources, strict=True)
        ]
    last = names[HOPS]
    question = f" Question: Which number is the value of {last}? Answer: The value of {last} is"
    return Story(pieces, [(question, False), *_listed(values[:1])])


def json_pairs(rng: np.random.Generator, depth: float) -> Story:
    """One object of string to number, as long as the sample; one of its keys is asked for."""
    names = _endless_names(rng, "-")
    key, last = next(names), next(names)
    value, end = _numbers(rng, 2)
    filler = (f' "{name}": {rng.integers(10**6, 10**7)},' for name in names)
    question = f' "{last}": {end}}} Question: What is the number of "{key}" in this JSON object? '
    question += f'Answer: The number of "{key}" is'
    return Story(
        [(depth, f' "{key}": {value},')],
        [(question, False), *_listed([value])],
        filler,
        " Here is a JSON object: {",
    )


def frequent_words(rng: np.random.Generator, depth: float) -> Story:
    """A list of words in blocks, of which every one has the most frequent word three times, the
    second twice and the third once. ``depth`` has no meaning: the answer is everywhere."""
    words = [str(word) for word in rng.permutation(NOUNS)]
    asked, others = words[:_ASKED_WORDS], cycle(words[_ASKED_WORDS:])
    repeated = [word for rank, word in enumerate(asked) for _ in range(_ASKED_WORDS - rank)]

    def blocks() -> Iterator[str]:
        while True:
            block = [*repeated, *(next(others) for _ in range(_OTHER_WORDS))]
            yield "".join(f" {word}," for word in rng.permutation(block))

    question = (
        f" end. Question: Which {_ASKED_WORDS} words occur most often in this list, the most "
        "frequent first? Answer: The most frequent words are"
    )
    return Story([], [(question, False), *_listed(asked)], blocks(), " Here is a list of words:")


def code(rng: np.random.Generator, depth: float) -> Story:
    """A constant among functions and other constants; an assertion names it again."""
    names = [key.replace(" ", "_").upper() for key in _keys(rng, VALUES + 1)]
    values = _numbers(rng, VALUES + 1)
    places = [depth, *rng.random(VALUES).tolist()]
    pieces = [
        (place, f"\n{name} = {value}")
        for place, name, value in zip(places, names, values, strict=True)
    ]
    functions = (
        f"\ndef {name}(value):\n    return {a} * value + {b}"
        for name, a, b in zip(_endless_names(rng, "_"), count(2), count(5), strict=False)
    )
    return Story(pieces, [(f"\nassert {names[0]} ==", False), *_listed(values[:1])], functions)


TASKS: dict[str, Callable[[np.random.Generator, float], Story]] = {
    "one_key": one_key,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variables": variables,
    "json": json_pairs,
    "frequent_words": frequent_words,
    "code": code,
}
"""What ``config.schema.RecallTask`` names."""
assert tuple(TASKS) == get_args(RecallTask)

WITHOUT_DEPTH = frozenset({"frequent_words"})
BY_LINES = frozenset({"code"})
"""Their texts are lines."""


def _states(key: str, value: str) -> str:
    return f" The access number of the {key} is {value}."


def _asks(pairs: list[tuple[str, str]]) -> list[Part]:
    tail: list[Part] = []
    for at, (key, value) in enumerate(pairs):
        question = f"{'.' if at else ''} Question: What is the access number of the {key}? "
        question += f"Answer: The access number of the {key} is"
        tail += [(question, False), *_listed([value])]
    return tail


def _listed(values: list[str]) -> list[Part]:
    """ " a, b, c" with each value an answer."""
    parts: list[Part] = []
    for at, value in enumerate(values):
        parts += [(", " if at else " ", False), (value, True)]
    return parts


def _keys(rng: np.random.Generator, number: int) -> list[str]:
    """Different in both words."""
    pairs: Any = (rng.choice(words, number, replace=False) for words in (ADJECTIVES, NOUNS))
    return [" ".join(pair) for pair in zip(*pairs, strict=True)]


def _numbers(rng: np.random.Generator, number: int) -> list[str]:
    """Different numbers of seven digits."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[str(rng.integers(10**6, 10**7))] = None
    return list(found)


def _endless_names(rng: np.random.Generator, joint: str) -> Iterator[str]:
    """Different names of two words and a number, in an order of their own."""
    sizes = len(ADJECTIVES), len(NOUNS)
    for cycle_number in count(10):
        for place in rng.permutation(sizes[0] * sizes[1]).tolist():
            words = ADJECTIVES[place % sizes[0]], NOUNS[place // sizes[0]]
            yield joint.join((*words, str(cycle_number)))


def _spread(depth: float, number: int) -> list[float]:
    """The first at ``depth``, the others evenly between there and the end."""
    return [depth + (1 - depth) * i / number for i in range(number)]
