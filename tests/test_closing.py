import pytest

from lctw_megatron.closing import Closing


class Recorder(Closing):
    def __init__(self) -> None:
        self.said: list[object] = []

    def close(self) -> None:
        self.said.append("closed")

    def give_up(self, error: BaseException) -> None:
        self.said.append(error)


class Always(Recorder):
    give_up = Closing.give_up


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_success_closes_and_an_error_gives_up_and_goes_on(kind):
    with Recorder() as good:
        pass
    error = kind()
    with pytest.raises(kind) as caught, Recorder() as bad:
        raise error
    assert caught.value is error
    assert (good.said, bad.said) == (["closed"], [error])


def test_what_has_nothing_to_give_up_is_closed_either_way():
    with pytest.raises(ValueError), Always() as always:
        raise ValueError
    assert always.said == ["closed"]
