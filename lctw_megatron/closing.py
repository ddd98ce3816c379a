"""Context managers that are closed on success and given up on an error."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """``with`` calls ``close`` when its body has succeeded and ``give_up`` when it has raised."""

    @abstractmethod
    def close(self) -> object:
        """Finish the work. May raise, if there is something wrong with it."""

    def give_up(self, error: BaseException) -> None:
        """Let go of what is held, and leave nothing that looks finished. ``error`` goes on."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.give_up(error)
