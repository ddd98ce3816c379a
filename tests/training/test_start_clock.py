"""The parts of a start add up to the time since the process began."""

import time

import psutil

from lctw_megatron.training.start_clock import StartClock


def test_the_parts_add_up_to_the_time_since_the_process_began() -> None:
    clock = StartClock()
    for part in ("import", "process groups", "first step"):
        clock.end(part)
    passed = time.time() - psutil.Process().create_time()
    assert abs(sum(clock.seconds.values()) - passed) < 1
    assert clock.line().startswith(f"first step after {sum(clock.seconds.values()):.1f} s: import ")
    assert clock.line().endswith("process groups 0.0, first step 0.0")
    assert list(clock.metrics()) == [
        "speed/start_import_seconds",
        "speed/start_process_groups_seconds",
        "speed/start_first_step_seconds",
    ]
