"""Saving and resuming a run: model, optimizer, step and loader, whole or not at all."""

import inspect
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import CheckpointException

from lctw_megatron.atomic import sync_directory
from lctw_megatron.errors import InputError, few
from lctw_megatron.model.checkpoint import (
    TOKENIZER,
    CheckpointManifest,
    agreed_index,
    check_files,
    load_shards,
    model_state,
    read_manifest,
    write_manifest,
)
from lctw_megatron.model.checkpoint_folder import (
    MANIFEST,
    complete_checkpoints,
    step_name,
    step_of,
)
from lctw_megatron.model.checksums import check_sums_together
from lctw_megatron.model.initialize import sharded_parameters
from lctw_megatron.model.not_taken import not_taken
from lctw_megatron.platform.world import first_rank_decides, on_first_rank
from lctw_megatron.training.exit_status import serve_until_parent_ends
from lctw_megatron.training.nonfinite import check_state
from lctw_megatron.training.optimizer_state import keep_own_settings, optimizer_shards
from lctw_megatron.training.shared_writing import collect_sums, sharing_strategy
from lctw_megatron.work_folder import remove, temporary_name

Result = TypeVar("Result")
_LEFTOVER = re.compile(r"\.step_\d+\.[0-9a-f]{8}\.tmp")

# Newer versions (0.19) write in the background with nvidia-resiliency-ext unless told otherwise.
_SAVE_OPTIONS: dict[str, Any] = {}
if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
    _SAVE_OPTIONS["async_strategy"] = "mcore"


@dataclass
class CheckpointWriter:
    """Writes OUTPUT/step_00000100 folders. All ranks call ``save``; one save is under way at most.

    A folder is written under a temporary name and renamed by the first rank once every rank's files
    are on the disk and the manifest in it, so a folder with the final name is complete. Data that
    any rank could not write (a full disk) are an InputError on the first rank, and the others leave
    with it, also if it happens in the background; what was written is removed and the older
    checkpoints stay.
    """

    folder: Path
    keep_last: int
    keep_every: int | None = None
    asynchronous: bool = False
    tokenizer_files: Path | None = None
    before: Callable[[], None] = lambda: None
    """What the first rank does before a save: put on the disk what must not be older than it."""
    _strategy: Any = field(default=None, init=False)
    """megatron-core's. Kept, as it knows who writes what."""
    _queue: Any = field(default=None, init=False)
    _writing: tuple[Path, CheckpointManifest] | None = field(default=None, init=False)
    """What an asynchronous save is writing: its temporary folder and its manifest."""

    def save(self, state: dict[str, Any], manifest: CheckpointManifest) -> None:
        """Write ``state`` (a sharded state dict) as the checkpoint of ``manifest.step``."""
        self.finish()
        name = step_name(manifest.step)
        check_state(self.folder / name, state)
        temporary = self._on_first_rank(name, None, lambda: self._make_temporary(name))
        _start_results_queue()
        first = self._strategy is None
        self._strategy = self._strategy or sharing_strategy()
        try:
            request = dist_checkpointing.save(
                state,
                str(temporary),
                self._strategy,
                validate_access_integrity=first,  # asks all ranks for all that they have
                async_sharded_save=self.asynchronous,
                **_SAVE_OPTIONS,
            )
        except CheckpointException as error:
            self._fail(name, temporary, error)
        if request is None:
            self._publish(temporary, manifest)
            return
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self._queue = self._queue or AsyncCallsQueue()
        self._queue.schedule_async_request(request)
        self._writing = temporary, manifest

    def finish(self, blocking: bool = True) -> None:
        """Complete an asynchronous save; ``blocking=False`` only if it has ended by itself."""
        if self._writing is None:
            return
        temporary, manifest = self._writing
        try:
            ended = self._queue.maybe_finalize_async_calls(blocking=blocking)
        except CheckpointException as error:
            self._writing = None
            self._fail(step_name(manifest.step), temporary, error)
        if ended:
            self._writing = None
            self._publish(temporary, manifest)

    def close(self) -> None:
        """Give up what has not been finished. No collective call: the other ranks may be gone."""
        if self._queue is not None and self._writing is not None:
            self._queue.async_calls[0].async_caller.close(abort=True)
        self._queue = self._writing = None

    def _make_temporary(self, name: str) -> Path:
        """A new, empty folder; what killed runs have left is removed.

        Its name is new too: a writer in the background may outlive the rank that was killed, and
        must not find the folder that the next run writes.
        """
        self.before()
        self._remove_leftovers()
        temporary = temporary_name(self.folder / name)
        temporary.mkdir(parents=True)
        # megatron-core's first file, a small one, is written by this rank alone while the others
        # wait for it: a disk that is full already must be found here.
        probe = temporary / "probe"
        try:
            probe.write_bytes(bytes(1 << 16))
            probe.unlink()
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return temporary

    def _publish(self, temporary: Path, manifest: CheckpointManifest) -> None:
        name = step_name(manifest.step)
        sums = collect_sums(temporary)
        self._on_first_rank(
            name, temporary, lambda: self._complete(temporary, name, manifest, sums)
        )

    def _complete(
        self, temporary: Path, name: str, manifest: CheckpointManifest, sums: dict[str, str]
    ) -> None:
        """sums: of the files that the ranks wrote; the others are this rank's."""
        final = self.folder / name
        if self.tokenizer_files is not None:
            shutil.copytree(self.tokenizer_files, temporary / TOKENIZER)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        write_manifest(temporary, manifest, sums)
        self._make_room(final)
        os.replace(temporary, final)
        sync_directory(self.folder)
        self._remove_old(manifest.step)

    def _remove_old(self, newest: int) -> None:
        """What is beyond ``newest``, the step just saved, was damaged and skipped: it must not
        count as kept."""
        kept = [path for path in complete_checkpoints(self.folder) if step_of(path) <= newest]
        for path in kept[: -self.keep_last]:
            if not (self.keep_every and step_of(path) % self.keep_every == 0):
                self._discard(path)

    def _discard(self, path: Path) -> None:
        """Remove a checkpoint. It gets a leftover's name first, so that after a kill in between no
        half of it counts as one, and the next save removes the rest. Of a link to an archive only
        the link goes."""
        if path.is_symlink():
            path.unlink()
            return
        leftover = temporary_name(path)
        os.replace(path, leftover)
        remove(leftover)

    def _make_room(self, final: Path) -> None:
        """What has the name of the new checkpoint: an older one goes, anything else moves aside."""
        if final.is_symlink() or (final / MANIFEST).is_file():
            self._discard(final)
        elif final.exists():
            aside = final.with_name(f"{final.name}.{secrets.token_hex(4)}.no_checkpoint")
            os.replace(final, aside)
            print(f"{final}: was no checkpoint, is now {aside}", flush=True)

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob(".step_*.tmp"):
            if not leftover.is_symlink() and _LEFTOVER.fullmatch(leftover.name):
                remove(leftover)

    def apply_retention(self, step: int) -> None:
        """At the start of a run that goes on after ``step``: what a kill has kept from being
        removed. First rank only."""
        self._remove_leftovers()
        self._remove_old(step)

    def _on_first_rank(
        self, name: str, temporary: Path | None, action: Callable[[], Result]
    ) -> Result:
        """What ``action`` gives on the first rank, on all; InputError there if the disk refuses."""

        def attempt() -> Result:
            try:
                return action()
            except OSError as error:
                raise self._given_up(name, temporary, f"{error}; {self._room()}") from None

        return first_rank_decides(attempt)

    def _fail(self, name: str, temporary: Path, error: CheckpointException) -> NoReturn:
        """megatron-core raises it on all ranks; the first knows why."""

        def give_up() -> NoReturn:
            reasons = sorted({str(cause[0]) for cause in error.failures.values()})
            raise self._given_up(name, temporary, f"{'; '.join(reasons)}; {self._room()}")

        first_rank_decides(give_up)

    def _room(self) -> str:
        """Not every version of megatron-core says that it was the disk."""
        try:
            return f"{shutil.disk_usage(self.folder).free / 1e6:.1f} MB free there"
        except OSError as error:  # raised here it would leave the other ranks waiting
            return f"{self.folder} cannot be reached: {error.strerror}"

    def _given_up(self, name: str, temporary: Path | None, reason: str) -> InputError:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        return InputError(
            f"{self.folder / name}: could not be written ({reason}); the checkpoints before it are "
            "whole, start again to go on from the newest"
        )


def _start_results_queue() -> None:
    """Start the process through which megatron-core's writers report to this rank.

    megatron-core would start it by itself, but then it outlives a killed rank, for ever, and dies
    of the signal that asks the rank to save.
    """
    if getattr(filesystem_async, "_results_queue", None) is None:
        # Linux's sockets without a file, as the path of one in a long TMPDIR is refused.
        address = f"\0{secrets.token_hex(16)}" if sys.platform == "linux" else None
        manager = SyncManager(address, ctx=get_context("spawn"))
        manager.start(serve_until_parent_ends)
        filesystem_async._results_queue = manager.Queue()


def run_state(chunks: list[Any], optimizer: Any) -> dict[str, Any]:
    """Sharded state dict of weights and optimizer. chunks: not wrapped for data parallelism."""
    return model_state(chunks) | {
        "optimizer": optimizer.state_dict(),
        "optimizer_shards": optimizer_shards(chunks, optimizer),
    }


def newest_checkpoint(
    folder: Path, log: Callable[[str], None]
) -> tuple[Path, CheckpointManifest] | None:
    """The newest complete checkpoint of ``folder``; None if there is none. All ranks call it.

    A half-written or damaged one is skipped with a line through ``log``; InputError if none is left
    of those that there are, as training would begin anew and remove them. The first rank chooses
    for all: on a network file system they need not see the same at the same moment.
    """
    candidates: list[Path] = []

    def begin() -> int:
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(
                f"{folder}: a file, or a link whose target is missing, expected a folder of "
                "checkpoints; mount or restore it, or remove it to begin anew"
            )
        for leftover in sorted(folder.glob(".step_*.tmp")) if folder.is_dir() else []:
            log(f"{leftover}: half-written, not used")
        candidates.extend(complete_checkpoints(folder))
        return len(candidates)

    def next_whole() -> tuple[Path, CheckpointManifest]:
        while candidates:
            path = candidates.pop()
            try:
                check_files(path)
                return path, read_manifest(path)
            except InputError as error:
                log(f"{path} is skipped: {error}")
        raise InputError(
            f"{folder}: none of its checkpoints ({number}) can be read, for the reasons above; put "
            "a whole one there, or move them away to begin anew"
        )

    number = first_rank_decides(begin)
    while number:
        path, manifest = first_rank_decides(next_whole)
        try:
            check_sums_together(path, manifest.checksums or {})
            return path, manifest
        except InputError as error:
            log(f"{path} is skipped: {error}")
    return None


def resume(
    checkpoint: Path,
    manifest: CheckpointManifest,
    chunks: list[Any],
    optimizer: Any,
    allow_changes: bool = False,
) -> None:
    """Load weights and optimizer of what ``newest_checkpoint`` gave. All ranks call it.

    allow_changes: leave tensors out that the model has no place for, with a line. Raises InputError
    if the two do not fit.
    """
    if not manifest.optimizer:
        raise InputError(
            f"{checkpoint}: holds no state of an optimizer; to begin from its weights name it as "
            "`start` of a new run_dir"
        )
    index = agreed_index(checkpoint)
    weights = [shard for _, shard in sharded_parameters(chunks)]
    own = optimizer_shards(chunks, optimizer, index.state_dict_metadata)
    if left_out := not_taken(weights + own, index):
        line = f"{checkpoint}: holds {few(left_out)}, for which the model has no place"
        if not allow_changes:
            raise InputError(
                f"{line}; restore the model, or pass --allow-changes to leave them out"
            )
        on_first_rank(lambda: print(f"{line}: left out of this run from now on", flush=True))
    loaded = load_shards(weights + own, checkpoint, index)
    keep_own_settings(optimizer, loaded["optimizer"])
    optimizer.load_state_dict(loaded["optimizer"])
