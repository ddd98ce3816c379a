"""Where the time from the start of a process to the end of its first step goes."""

import time

import psutil


class StartClock:
    """Seconds of the parts of a start, in order, on this rank."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self.seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """``part`` has lasted from the end of the one before until now."""
        now = time.time()
        self.seconds[part] = max(now - self._last, 0.0)
        self._last = now

    def line(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"

    def metrics(self) -> dict[str, float]:
        return {
            f"speed/start_{part.replace(' ', '_')}_seconds": round(seconds, 3)
            for part, seconds in self.seconds.items()
        }
