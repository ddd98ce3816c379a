"""A stretch of a file as a file of its own, as torch.load wants one."""

import io
import os
from typing import Any


class FilePart(io.RawIOBase):
    """``length`` bytes of a file from ``offset`` on, as a file of its own for torch.load.

    file: opened without a buffer and used by nobody else meanwhile, for it is moved.
    """

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fills ``buffer`` unless the end comes first: torch does not ask twice, and one call of
        the system reads at most 2 GiB."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.seek(self._offset + self._position)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                break
            done += count
        self._position += done
        return done

    def read_all(self, buffer: memoryview) -> None:
        """Fills ``buffer`` or raises EOFError."""
        if self.readinto(buffer) != len(buffer):
            raise EOFError("the file ends too early")
