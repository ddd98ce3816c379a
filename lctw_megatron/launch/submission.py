"""submit.sh: the sbatch commands of a recipe's jobs, in order, each with the jobs it waits for.

tools/launch.py runs this script and reads the ids of the jobs from it, so what it does can be read,
kept and done by hand.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

_HEAD = """\
#!/bin/bash
# Submits the jobs of {recipe} in order. tools/launch.py runs it and keeps the ids; of jobs that are
# submitted by hand, `bash {path}`, it does not know.
set -euo pipefail
cd {folder}
declare -A id

submit() {{ # NAME [OPTION...] SCRIPT: prints NAME and the job's id, which others wait for
    local said
    said=$(sbatch --parsable "${{@:2}}" 2>&1) || {{ echo "sbatch --parsable ${{*:2}}: $said" >&2; exit 1; }}
    # A site's sbatch may say more: the id is a line of its own, ID or ID;CLUSTER.
    id[$1]=$(sed -nE 's/^([0-9]+)(;[^[:space:]]*)?[[:space:]]*$/\\1/p' <<< "$said" | tail -n 1)
    if [ -z "${{id[$1]}}" ]; then
        echo "sbatch --parsable ${{*:2}}: no line with a job's id in what it said: '$said'" >&2
        exit 1
    fi
    echo "$1 ${{id[$1]}}"
}}

"""  # noqa: E501


class Submission:
    """The text of the script, made job by job."""

    def __init__(self, recipe: str, path: Path) -> None:
        self.path = path
        folder = shlex.quote(os.getcwd())
        self._lines = [_HEAD.format(recipe=recipe, path=shlex.quote(str(path)), folder=folder)]

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
