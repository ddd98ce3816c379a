import pytest

from lctw_megatron.scoring.forward import divide


@pytest.mark.parametrize(
    ("windows", "room", "multiple", "expected"),
    [
        (4, 4, 1, (1, 4)),
        (5, 4, 1, (2, 3)),  # six windows are run for five, not eight
        (9, 4, 1, (3, 3)),
        (3, 0, 1, (3, 1)),  # a window is longer than a forward should be
        (5, 8, 2, (2, 3)),  # two interleaved stages
        (1, 4, 2, (2, 1)),
    ],
)
def test_windows_are_run_in_few_forwards_of_equal_size(
    windows: int, room: int, multiple: int, expected: tuple[int, int]
) -> None:
    assert divide(windows, room, multiple) == expected
