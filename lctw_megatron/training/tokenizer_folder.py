"""The tokenizer folder that goes into a run's checkpoints, with what else came with the model."""

import filecmp
import shutil
from pathlib import Path

from lctw_megatron.atomic import atomic_directory
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.tokenizer_files import (
    CONFIG,
    GENERATION_CONFIG,
    has_tokenizer,
    tokenizer_files,
)
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError, few


class TokenizerFolder:
    """The tokenizer folder of the data, whole; where the data name a model file alone, the start's,
    whose tokenizer is the same (compatibility.complete_run). Generation settings that the data's
    folder lacks are the start's, also if there is no tokenizer at all.

    Made before the model is built: InputError if the tokenizer is another now than when the data
    were tokenised. Nothing is written before ``write``.
    """

    def __init__(self, identity: TokenizerIdentity, start: Path | None) -> None:
        """start: the tokenizer folder of the checkpoint that the run begins with, if any."""
        self._source = source = Path(identity.path)
        self._start = start if start is not None and start.is_dir() else None
        self._tokenizer = load_tokenizer(source) if source.exists() else None
        if self._tokenizer and self._tokenizer.identity.digest != identity.digest:
            raise InputError(
                f"tokenizer {source}: its digest is {self._tokenizer.identity.digest}, but the "
                f"data were tokenised with {identity.digest}; restore its files, or preprocess "
                "again"
            )

    def write(self, folder: Path) -> Path | None:
        """Make ``folder``; None, and a line, if there is nothing to put into it. One that an
        earlier start of the run has made stays if its source is gone."""
        start = self._start
        from_start = start is not None and has_tokenizer(start)
        if self._tokenizer is None and not from_start:
            if has_tokenizer(folder):
                return folder
            print(f"{self._source}: not found, so the checkpoints carry no tokenizer files")
            if start is None:
                return None
        with atomic_directory(folder) as target:
            if start is not None and (
                self._tokenizer is None or (from_start and not self._source.is_dir())
            ):
                shutil.copytree(start, target, dirs_exist_ok=True)
                return folder
            assert self._tokenizer is not None
            self._tokenizer.save_hf(target)
            if start is not None and not (target / GENERATION_CONFIG).exists():
                for name in (GENERATION_CONFIG, CONFIG):
                    if (start / name).is_file():
                        shutil.copyfile(start / name, target / name)
            if left := _left_behind(start, target):
                print(
                    f"{self._source}: made the data, so its files go into the checkpoints, not "
                    f"those that came with the start where they differ: {few(left)}; copy into it "
                    "what is to be kept"
                )
        return folder


def _left_behind(start: Path | None, taken: Path) -> list[str]:
    """Files that came with the start, whose like ``taken`` lacks or has with other contents."""
    if start is None:
        return []
    names = [str(path.relative_to(start)) for path in tokenizer_files(start)]
    return [
        name
        for name in [*names, CONFIG]
        if (start / name).is_file()
        and not ((taken / name).is_file() and filecmp.cmp(start / name, taken / name, False))
    ]
