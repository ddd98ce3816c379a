"""Asking SLURM's squeue, for which its user's own settings do not count."""

import os
import subprocess


def ask_squeue(*options: str) -> subprocess.CompletedProcess[str]:
    """squeue --noheader with ``options``. SQUEUE_FORMAT, SQUEUE_STATES, SQUEUE_USERS and the like
    would change what it prints or leave out jobs. Raises OSError without SLURM, TimeoutExpired
    after a minute."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    return subprocess.run(
        ["squeue", "--noheader", *options],
        capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, env=own,
        timeout=60,
    )  # fmt: skip
