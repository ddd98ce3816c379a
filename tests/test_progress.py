import io

import pytest

from lctw_megatron import progress as module
from lctw_megatron.progress import Progress, clock, human


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def time(monkeypatch):
    """A clock that the test moves."""

    class Time:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    fake = Time()
    monkeypatch.setattr(module, "time", fake)
    return fake


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (7, "7"),
        (7.25, "7.25"),
        (999, "999"),
        (999.7, "1k"),
        (1234567, "1.23M"),
        (4e13, "40T"),
        (5e15, "5000T"),
    ],
)
def test_human_numbers(number, text):
    assert human(number) == text


def test_clock():
    assert clock(59.6) == "0:01:00"
    assert clock(3661) == "1:01:01"


def test_log_has_one_line_per_interval_with_rates_and_time_left(time):
    stream = io.StringIO()
    with Progress("tokenise", 1000, "bytes", stream=stream) as progress:
        for _ in range(20):  # 20 s, 20 bytes each
            time.now += 1
            progress.update(20, tokens=4)
    assert stream.getvalue().splitlines() == [
        "tokenise: 200/1k bytes (20 %), 20 bytes/s, 4 tokens/s, 0:00:40 left",
        "tokenise: 400/1k bytes (40 %), 20 bytes/s, 4 tokens/s, 0:00:30 left",
        "tokenise: 400/1k bytes (40 %), 20 bytes/s, 4 tokens/s, 0:00:20 elapsed",
    ]


def test_the_end_is_said_once(time):
    stream = io.StringIO()
    with Progress("train", 2, "steps", stream=stream) as progress:
        for _ in range(2):
            time.now += 15
            progress.update()
    assert stream.getvalue().splitlines() == [
        "train: 1/2 steps (50 %), 0.0667 steps/s, 0:00:15 left",
        "train: 2/2 steps (100 %), 0.0667 steps/s, 0:00:30 elapsed",
    ]


def test_work_of_an_earlier_run_is_done_but_is_not_speed(time):
    stream = io.StringIO()
    with Progress("score", 100, "shards", initial=90, stream=stream) as progress:
        time.now += 10
        progress.note("resumed")
        progress.update(5)
    assert stream.getvalue().splitlines()[-1] == (
        "score: 95/100 shards (95 %), 0.5 shards/s, resumed, 0:00:10 elapsed"
    )


def test_unknown_total_shows_no_time_left(time):
    stream = io.StringIO()
    with Progress("read", None, "documents", stream=stream) as progress:
        time.now += 2
        progress.update(10)
    assert stream.getvalue() == "read: 10 documents, 5 documents/s, 0:00:02 elapsed\n"


def test_terminal_gets_one_bar_with_the_counters():
    stream = Terminal()
    with Progress("tokenise", 10, "documents", stream=stream) as progress:
        progress.update(10, tokens=3)
    text = stream.getvalue()
    assert "100%" in text and "tokens/s" in text and "\n" not in text.strip()


def test_an_error_is_not_preceded_by_a_line_of_progress():
    stream = io.StringIO()
    with pytest.raises(ValueError), Progress("score", 10, "shards", stream=stream) as progress:
        progress.update(5)
        raise ValueError
    assert stream.getvalue() == ""
