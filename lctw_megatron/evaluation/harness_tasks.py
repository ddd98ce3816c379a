"""Names of lm-evaluation-harness's tasks, and the calls that answer for them.

A call is one task; one of RULER at one length, since `limit` counts over all lengths together, and
since a sample depends on what was drawn for the tasks and lengths before it.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lctw_megatron.errors import InputError, few

RULER_MADE = (
    "niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe",
)  # fmt: skip
"""The tasks of RULER whose texts are made on the spot."""

ESSAYS = "the data set baber/paul_graham_essays"
RULER_FETCHED = {
    "niah_single_2": ESSAYS,
    "niah_single_3": ESSAYS,
    "niah_multikey_1": ESSAYS,
    "niah_multiquery": ESSAYS,
    "niah_multivalue": ESSAYS,
    "ruler_qa_squad": "SQuAD from rajpurkar.github.io",
    "ruler_qa_hotpot": "HotpotQA from huggingface.co",
}
"""The others, and what each downloads."""

RULER = (*RULER_MADE, *RULER_FETCHED)

SHORT = {"mmlu": 5, "arc_challenge": 25, "arc_easy": 25, "hellaswag": 10, "bbh_fewshot": None}
"""What a longer context may cost, with the examples before a question that are usual for each;
None: the task's own."""

SHORTEST = 1024
"""Below it some of RULER's generators never end: their smallest samples do not fit."""

MARGIN = 256
"""Tokens that max_length needs beyond RULER's length: its prompts get the beginning of the answer
after they were measured, and fwe counts no answer at all. What is longer loses its first tokens."""


@dataclass(frozen=True)
class Call:
    """One call of the harness."""

    task: str
    """A task, group or tag of the harness, or a YAML file that defines one."""
    length: int | None = None
    """Tokens of RULER's samples, prompt and answer."""
    fewshot: int | None = None
    """Examples before a question; None: the task's own."""

    def gave(self, record: dict[str, Any]) -> bool:
        """Whether ``record`` of a result file answers this call."""
        return record.get("call") == asdict(self)


def calls_for(names: Sequence[str], lengths: Sequence[int], offline: bool) -> list[Call]:
    """The calls for sets (`ruler`, `longbench`, `short`) and tasks, each once, shortest first.

    Offline, `ruler` is those of its tasks that download nothing. InputError for lengths that RULER
    cannot have, or that nothing has a use for.
    """
    found: list[Call] = []
    for name in names:
        if name == "ruler":
            found += [Call(task, n) for n in lengths for task in (RULER_MADE if offline else RULER)]
        elif name == "short":
            found += [Call(task, fewshot=shots) for task, shots in SHORT.items()]
        elif name in RULER:
            found += [Call(name, n) for n in lengths]
        else:  # a file is one task, whatever its path is called
            found.append(Call(os.path.relpath(name) if Path(name).is_file() else name))
    asked = [name for name in names if name == "ruler" or name in RULER]
    if asked and not lengths:
        raise InputError(
            f"--tasks {few(asked)}: RULER makes samples of any length; give --lengths, e.g. 4096"
        )
    if lengths and not asked:
        raise InputError(f"--lengths {few(lengths)}: of RULER's tasks only, and none is asked for")
    if lengths and min(lengths) < SHORTEST:
        raise InputError(
            f"--lengths {min(lengths)}: RULER's smallest samples do not fit into it; give at least "
            f"{SHORTEST}"
        )
    return sorted(dict.fromkeys(found), key=lambda call: call.length or 0)


def downloads(calls: Sequence[Call], offline: bool) -> list[str]:
    """What must be on this machine or is downloaded, a line each."""
    fetched = dict.fromkeys(RULER_FETCHED[c.task] for c in calls if c.task in RULER_FETCHED)
    hub = dict.fromkeys(c.task for c in calls if c.length is None and not Path(c.task).is_file())
    how = "must be on this machine" if offline else "are downloaded unless they are here"
    lines = [f"{few(list(fetched))}: texts of RULER, {how}"] if fetched else []
    lines += [f"{few(list(hub))}: their data on the Hugging Face hub {how}"] if hub else []
    if lines or (offline and any(c.length for c in calls)):
        lines.append(without_network())
    return lines


def without_network() -> str:
    """Which tasks ask nobody for data."""
    return f"without network run {', '.join(RULER_MADE)}, and tasks over files of yours"
