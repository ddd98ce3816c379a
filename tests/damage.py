"""Seeded damage: one bit, the end, or one field of a file is another."""

import json
import random
from typing import Any

ODD = [None, True, -1, 0, 2**62, 10**400, 1e308, float("nan"), "", "a\n", [], {}, [[]], {"a": {}}]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """One bit changed, a stretch overwritten, left out or doubled, or the end cut off."""
    changed = bytearray(content)
    at = draw.randrange(len(content))
    end = min(at + draw.choice([1, 4, 64]), len(content))
    match draw.choice(["bit", "bit", "bit", "cut", "overwritten", "missing", "doubled"]):
        case "bit":
            changed[at] ^= 1 << draw.randrange(8)
        case "cut":
            del changed[at:]
        case "overwritten":
            changed[at:end] = draw.randbytes(end - at)
        case "missing":
            del changed[at:end]
        case "doubled":
            changed[at:at] = changed[at:end]
    return bytes(changed)


def damaged_json(value: Any, draw: random.Random) -> bytes:
    """``value`` as JSON with one field, at any depth, missing or something else; or damaged bytes
    of it."""
    value = json.loads(json.dumps(value))
    if draw.random() < 0.5:
        return damaged_bytes(json.dumps(value).encode(), draw)
    places = [value]
    for place in places:  # grows while it is read
        inner = place.values() if isinstance(place, dict) else place[:3]
        places += [each for each in inner if isinstance(each, dict | list) and each]
    place = draw.choice(places)
    name = draw.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
    if draw.random() < 0.3:
        del place[name]
    else:
        place[name] = draw.choice(ODD)
    return json.dumps(value).encode()
