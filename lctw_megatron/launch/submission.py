"""submit.sh: the sbatch commands of a recipe's jobs, in order, each with the jobs it waits for.

tools/launch.py runs this script and reads the ids of the jobs from it, so what it does can be read,
kept and done by hand.
"""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

_HEAD = """\
#!/bin/bash
# Submits the jobs of {recipe} in order. tools/launch.py runs it and keeps the ids; of jobs that are
# submitted by hand, `bash {path}`, it does not know.
set -euo pipefail
cd {folder}
# sbatch would let these override what the scripts say, or (SBATCH_WAIT) wait for the jobs' end.
unset {variables}
declare -A id

submit() {{ # NAME [OPTION...] SCRIPT: prints NAME and the job's id, which others wait for
    local said
    said=$(sbatch --parsable "${{@:2}}" 2>&1) || {{ echo "sbatch --parsable ${{*:2}}: $said" >&2; exit 1; }}
    # A site's sbatch may say more, in colours: the id is a line of its own, ID or ID;CLUSTER, or what
    # sbatch says without --parsable.
    id[$1]=$(sed -nE -e $'s/\\x1b\\[[0-9;]*[A-Za-z]//g' -e \\
        's/^[[:space:]]*(Submitted batch job )?([0-9]+)((;| on cluster )[^[:space:]]*)?[[:space:]]*$/\\2/p' \\
        <<< "$said" | tail -n 1)
    if [ -z "${{id[$1]}}" ]; then
        echo "sbatch --parsable ${{*:2}}: no line with a job's id in what it said: '$said'" >&2
        exit 1
    fi
    echo "$1 ${{id[$1]}}"
}}

# Inside a job, its own sizes and bindings would rule those that are submitted here.
if [ -n "${{SLURM_JOB_ID:-}}" ]; then
    for name in "${{!SLURM_@}}"; do
        case $name in SLURM_CONF | SLURM_JWT | SLURM_CLUSTERS) ;; *) unset "$name" ;; esac
    done
fi

"""  # noqa: E501


_VARIABLES = {
    "array": ["SBATCH_ARRAY_INX"],
    "mem": ["SBATCH_MEM_PER_NODE"],
    "requeue": ["SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"],
    "time": ["SBATCH_TIMELIMIT"],
}
"""The environment's variables of those options of sbatch that are not called SBATCH_OPTION."""

_SHORT = {
    "A": "account", "C": "constraint", "G": "gpus", "J": "job-name", "M": "clusters", "a": "array",
    "e": "error", "i": "input", "m": "distribution", "o": "output", "p": "partition", "q": "qos",
    "t": "time",
}  # fmt: skip
"""Options of one letter, as a site may say them, that the environment has a variable of."""


class Submission:
    """The text of the script, made job by job."""

    def __init__(self, recipe: str, path: Path, scripts: Iterable[str]) -> None:
        """scripts: the texts of all jobs' scripts. What none of them says, a site's or a user's own
        SBATCH_ACCOUNT for example, stays as it is."""
        self.path = path
        said = re.findall(r"^#SBATCH -(?:-([a-z-]+)|(\w))", "\n".join(scripts), re.MULTILINE)
        variables = {"SBATCH_WAIT"}
        for option in [long or _SHORT.get(letter, letter) for long, letter in said]:
            variables |= set(_VARIABLES.get(option, [f"SBATCH_{option.upper().replace('-', '_')}"]))
        self._lines = [
            _HEAD.format(
                recipe=recipe,
                path=shlex.quote(str(path)),
                folder=shlex.quote(os.getcwd()),
                variables=" ".join(sorted(variables)),
            )
        ]

    def done(self, name: str) -> None:
        self._lines.append(f"# {name}: done before\n")

    def queued(self, name: str, job: str) -> None:
        self._lines.append(f"id[{shlex.quote(name)}]={job} # is in the queue\n")

    def submit(self, name: str, script: Path, after: Sequence[str], parts: Iterable[int]) -> None:
        """after: names of jobs before it in the script. parts: of an array; none: a single job."""
        words = ["submit", shlex.quote(name)]
        if after:
            ids = ":".join(f"${{id[{shlex.quote(other)}]}}" for other in after)
            words += [f"--dependency=afterok:{ids}", "--kill-on-invalid-dep=yes"]
        if array := ",".join(map(str, parts)):
            words.append(f"--array={array}")
        self._lines.append(" ".join([*words, shlex.quote(str(script))]) + "\n")

    @property
    def text(self) -> str:
        return "".join(self._lines)
