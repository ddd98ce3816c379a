"""How far a long job is: a bar on a terminal, plain lines in a log."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from lctw_megatron.closing import Closing

LOG_INTERVAL_SECONDS = 10.0


def human(number: float) -> str:
    """Three digits and a thousand's letter: 1234567 -> 1.23M."""
    if abs(number) < 0.9995:
        return f"{number:.3g}"
    power = 0
    while abs(number) >= 999.5 and power < 4:
        number /= 1000
        power += 1
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    text = f"{number:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " kMGT"[power].strip()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class Progress(Closing):
    """``with Progress("tokenise", total, "bytes") as progress: progress.update(n, tokens=m)``.

    Writes to standard error. On a terminal it is one moving bar; anywhere else one line every
    ``LOG_INTERVAL_SECONDS`` and one at the end. Both show the share done, the rate and the time
    left, and for every named counter its rate. ``total`` None means unknown (no time left shown).
    ``initial`` units were done before, by an earlier run: they count as done, but not as speed.
    """

    def __init__(
        self,
        label: str,
        total: float | None,
        unit: str,
        initial: float = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = initial
        self._initial = initial
        self._counters: dict[str, float] = {}
        self._note = ""
        self._stream = stream if stream is not None else sys.stderr
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total,
                desc=label,
                unit=" " + unit,
                unit_scale=True,
                initial=initial,  # type: ignore[arg-type]  # the stub says int, floats work
                file=self._stream,
                dynamic_ncols=True,
            )

    def update(self, amount: float = 1, **counters: float) -> None:
        """``amount`` more units are done; each counter has grown by its value."""
        self.done += amount
        for name, value in counters.items():
            self._counters[name] = self._counters.get(name, 0) + value
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._extras()), refresh=False)
            self._bar.update(amount)
        elif self.done == self.total:
            pass  # the line at the end says so
        elif time.monotonic() - self._last_line >= LOG_INTERVAL_SECONDS:
            self._write_line(self._time_left())

    def note(self, text: str) -> None:
        """Show ``text`` at the end of the bar or line from now on."""
        self._note = text

    def close(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._extras()))
            self._bar.close()
        else:
            self._write_line(f"{clock(self._elapsed())} elapsed")

    def give_up(self, error: BaseException) -> None:
        if self._bar is not None:  # in a log the one line of the error shall stand alone
            self.close()

    def _elapsed(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _extras(self) -> list[str]:
        elapsed = self._elapsed()
        rates = [f"{human(value / elapsed)} {name}/s" for name, value in self._counters.items()]
        return rates + ([self._note] if self._note else [])

    def _rate(self) -> float:
        return (self.done - self._initial) / self._elapsed()

    def _time_left(self) -> str:
        if self.total and self._rate() > 0:
            return f"{clock(max(self.total - self.done, 0) / self._rate())} left"
        return f"{clock(self._elapsed())} elapsed"

    def _write_line(self, end: str) -> None:
        self._last_line = time.monotonic()
        done = human(self.done)
        if self.total:
            done += f"/{human(self.total)} {self.unit} ({100 * self.done / self.total:.0f} %)"
        else:
            done += f" {self.unit}"
        parts = [done, f"{human(self._rate())} {self.unit}/s", *self._extras(), end]
        print(f"{self.label}: " + ", ".join(parts), file=self._stream, flush=True)
