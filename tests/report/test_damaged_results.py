"""Result files that somebody cut, changed or wrote by hand: one line, and no NaN in a table."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from lctw_megatron.errors import InputError
from lctw_megatron.report.runs import read_run
from tests.report.written_runs import write_recall, write_run

DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "weights.histogram: starts": (
        "evaluation.json", lambda v: v["weights"]["histogram"].update(starts=[0.0, 2.0, 1.0])
    ),
    "weights.histogram: targets has": (
        "evaluation.json", lambda v: v["weights"]["histogram"]["targets"].pop()
    ),
    "weights.classes: weight has 2 ent": (
        "evaluation.json", lambda v: v["weights"]["classes"]["weight"].pop()
    ),
    "weights.page: weight has 7 ent": (
        "evaluation.json", lambda v: v["weights"]["page"]["weight"].pop()
    ),
    "weights.page.weight.0": (
        "evaluation.json", lambda v: v["weights"]["page"].update(weight=[None] * 8)
    ),
    "weights.page: Field": ("evaluation.json", lambda v: v["weights"].pop("page")),
    "weights.weighting": ("evaluation.json", lambda v: v["weights"].update(weighting=None)),
    "weights": ("evaluation.json", lambda v: v.update(weights=[1])),
    "sequences": ("evaluation.json", lambda v: v.update(sequences=[])),
    "it: classes are not near, far": (
        "evaluation.json", lambda v: v["classes"].update(bins=["a", "b", "c"])
    ),
    "position.sequence_loss.0.0: Input should be a finite": (
        "evaluation.json", lambda v: v["position"]["sequence_loss"][0].__setitem__(0, math.nan)
    ),
    "cells.0.nats.0: Input should be a finite": (
        "recall.json", lambda v: v["cells"][0]["nats"].__setitem__(0, math.inf)
    ),
    "it: one_key at 4096, 0.0 is not in its settings": (
        "recall.json", lambda v: v["settings"].update(lengths=[1024])
    ),
    "distance.gain: Input": ("evaluation.json", lambda v: v["distance"].update(gain="much")),
    "distance: not a value of every": (
        "evaluation.json", lambda v: v["distance"]["gain"].pop()
    ),
    "longppl.longppl": ("evaluation.json", lambda v: v["longppl"].update(longppl="8")),
    "longppl: keys without": ("evaluation.json", lambda v: v["longppl"].update(keys="k")),
    "it: longppl has not a value of every": (
        "evaluation.json",
        lambda v: v["longppl"].update(keys="k", sequence_loss=[1.0], sequence_targets=[1]),
    ),
    "targets: Input should be greater": ("evaluation.json", lambda v: v.update(targets=-1)),
    "position.targets.0: Input should be greater": (
        "evaluation.json", lambda v: v["position"]["targets"].__setitem__(0, -1)
    ),
    "classes.sequence_targets.0.0: Input should be greater": (
        "evaluation.json", lambda v: v["classes"]["sequence_targets"][0].__setitem__(0, -1)
    ),
    "it: not a row of every sequence": (
        "evaluation.json", lambda v: v["classes"]["sequence_loss"].pop()
    ),
    "cells.0.tokens.0: Input should be less": (
        "recall.json", lambda v: v["cells"][0]["tokens"].__setitem__(0, 10**30)
    ),
    "cells.0: answers without": ("recall.json", lambda v: v["cells"][0].update(tokens=[0] * 4)),
    "it: one_key at 1024, 0.0 is there twice": (
        "recall.json", lambda v: v["cells"].append(v["cells"][0])
    ),
    "it: json at 4096, 1.0 is not in its": (
        "recall.json", lambda v: v["cells"].reverse() or v["settings"].update(depths=[0.0])
    ),
}  # fmt: skip
"""What the line says -> file and damage."""


def test_damage_inside_a_result_is_one_line(tmp_path):
    folder = write_recall(write_run(tmp_path / "run", weighted=True))
    assert read_run(folder).weights
    for said, (name, damage) in DAMAGES.items():
        kept = (folder / name).read_text()
        value = json.loads(kept)
        damage(value)
        (folder / name).write_text(json.dumps(value))
        with pytest.raises(InputError, match=rf"{name}: damaged \({said}") as error:
            read_run(folder)
        assert "\n" not in str(error.value)
        (folder / name).write_text(kept)


def test_weights_without_a_page_are_reported(tmp_path):
    folder = write_run(tmp_path / "run", weighted=True)
    value = json.loads((folder / "evaluation.json").read_text())
    value["weights"]["page"] = None
    (folder / "evaluation.json").write_text(json.dumps(value))
    assert read_run(folder).weights
    value["weights"] = "the training data are gone"
    (folder / "evaluation.json").write_text(json.dumps(value))
    assert read_run(folder).weights is None


@pytest.mark.parametrize("name", ["evaluation.json", "recall.json"])
def test_a_result_that_lacks_something_is_one_line(tmp_path, name):
    folder = write_recall(write_run(tmp_path / "run"))
    path = folder / name
    whole = json.loads(path.read_text())
    assert read_run(folder)
    parts = {name: whole[name] for name in ("settings", "classes", "distance") if name in whole}
    parts |= {"cell": whole["cells"][2]} if "cells" in whole else {"longppl": whole["longppl"]}
    free = {"format", "seconds", "mean", "haystack", "samples", "short"}
    for part in [whole, *parts.values()]:
        for key in part.keys() - free:
            kept, part[key] = part[key], {}
            path.write_text(json.dumps(whole))
            with pytest.raises(InputError, match=rf"{name}: damaged \(.*\); ") as error:
                read_run(folder)
            assert "\n" not in str(error.value)
            part[key] = kept
    rows = whole["cells"][0]["right"] if "cells" in whole else whole["position"]["sequence_loss"][1]
    rows.pop()
    path.write_text(json.dumps(whole))
    with pytest.raises(InputError, match="not a value of every "):
        read_run(folder)
