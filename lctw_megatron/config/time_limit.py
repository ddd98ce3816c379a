"""Time limits as SLURM's sbatch takes them."""

import math
import re


def limit_seconds(limit: str) -> float:
    """Seconds of ``limit``: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds or UNLIMITED. ValueError if it is none."""
    if limit.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit, re.ASCII)
    if match is None:
        raise ValueError("a time such as 24:00:00 or 1-12:00:00")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(n * u for n, u in zip(numbers, units, strict=False))
