"""What is to be scored with what, whether the two fit, and how much of it is done already."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lctw_megatron.config.layout_rules import check_model, without_gradients
from lctw_megatron.config.model_sizes import forward_tokens
from lctw_megatron.config.rope import longest_context
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.config.sidecar_name import NAME_RULE, is_sidecar_name
from lctw_megatron.data.indexed_array import data_path, stored_dtype
from lctw_megatron.data.manifest import SidecarManifest, read_manifest
from lctw_megatron.data.sidecar import Sidecar, sidecar_prefix
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError, few
from lctw_megatron.model import checkpoint as checkpoints
from lctw_megatron.scoring.sidecar_shard import Settings, ShardReader, shard_files, shard_path
from lctw_megatron.scoring.window_plan import WindowPlan
from lctw_megatron.scoring.windows import WINDOWS_VERSION, Windowing
from lctw_megatron.work_folder import remove_work_folder

SHARD_TOKENS = 1 << 22
"""Tokens that the scorer reads for one shard, if the number of shards is not given: what a killed
process loses at most. Seconds on a GPU, up to an hour on a CPU."""

_MOST_SHARDS = 10_000
_MOST_ASKED = 99_999
_ARITHMETIC = ("precision", "tokens_per_forward", "tensor")


@dataclass(frozen=True)
class Job:
    """One sidecar to be made. Making a Job checks that scorer, data and windows fit: InputError.
    Where the first rank makes it, the scorer it has found travels with it to the others.

    data: prefix of the token dataset. checkpoint: a run folder, its checkpoints or one checkpoint.
    precision, tokens_per_forward: None goes on as the work was begun that is there, so that a merge
    or a rest may run elsewhere; else ``device``, the type of what scores, decides.
    """

    data: str
    checkpoint: str
    windowing: Windowing
    name: str = "short_loss"
    layout: LayoutConfig = LayoutConfig()
    precision: str | None = None
    tokens_per_forward: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not is_sidecar_name(self.name):
            raise InputError(f"--name is {self.name!r}, expected {NAME_RULE}")
        self._check_name()
        _ = self.plan  # refuses windows that cannot be
        self._check_model()
        self._check_tokenizer()

    def __getstate__(self) -> dict[str, Any]:
        names = ("scorer_path", "scorer_manifest", "arithmetic")
        found = {name: getattr(self, name) for name in names}
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, **found}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def dataset(self) -> TokenDataset:
        return TokenDataset(self.data)

    @cached_property
    def scorer_path(self) -> Path:
        return checkpoints.find_checkpoint(self.checkpoint).resolve()

    @cached_property
    def scorer_manifest(self) -> checkpoints.CheckpointManifest:
        return checkpoints.read_manifest(self.scorer_path)

    @property
    def forward_layout(self) -> LayoutConfig:
        """``layout``, and the scorer's experts shared out in it."""
        return without_gradients(self.layout, self.scorer_manifest.model)

    @cached_property
    def arithmetic(self) -> dict[str, Any]:
        """``precision`` and ``tokens_per_forward`` (see the class)."""
        given = {"precision": self.precision, "tokens_per_forward": self.tokens_per_forward}
        usual = {
            "precision": "bf16" if self.device == "cuda" else "fp32",
            "tokens_per_forward": forward_tokens(self.scorer_manifest.model, self.device),
        }
        begun = self._begun() if None in given.values() else {}
        return {name: given[name] or begun.get(name) or usual[name] for name in usual}

    def _begun(self) -> Settings:
        """Settings of a shard or of the sidecar that is there, if it is of the same windows of the
        same data under the same scorer; empty without."""
        begun: Settings = {}
        with suppress(InputError, OSError):
            begun = _settings_of(read_manifest(self.prefix, SidecarManifest))
        for path in sorted(shard_files(self.folder))[:1]:
            with suppress(InputError, OSError):
                begun = ShardReader(path).settings
        return begun if self._asked.items() <= begun.items() else {}

    @cached_property
    def plan(self) -> WindowPlan:
        return WindowPlan(
            self.dataset.lengths, self.windowing, self.arithmetic["tokens_per_forward"]
        )

    @property
    def prefix(self) -> str:
        return sidecar_prefix(self.data, self.name)

    @property
    def folder(self) -> Path:
        """Where finished shards wait for the merge."""
        return Path(f"{self.prefix}.shards")

    @property
    def bos_id(self) -> int | None:
        """What windows that begin in the middle of a document read first; None: as stored."""
        return self.dataset.manifest.tokenizer.first_id

    @cached_property
    def _asked(self) -> Settings:
        """``settings`` that nothing but the request decides."""
        return {
            "tokens_fingerprint": self.dataset.fingerprint,
            "tokenizer_digest": self.dataset.manifest.tokenizer.digest,
            "scorer_digest": checkpoints.checkpoint_digest(self.scorer_path),
            **self.windowing._asdict(),
            "windows_version": WINDOWS_VERSION,
        }

    @cached_property
    def settings(self) -> Settings:
        """Everything that the losses depend on, to the last bit on one kind of machine: the shape
        of a forward and the way a matrix is split change the order of sums. The number of threads
        does not, for matrices whose sizes are multiples of 16 (MKL, 1 to 16 threads: none of 450
        products differed; of odd sizes 3 of 150 did, all with 16 threads)."""
        return {**self._asked, **self.arithmetic, "tensor": self.layout.tensor}

    def details(self) -> dict[str, Any]:
        """The sidecar manifest's fields that say how the values were made."""
        statistics, manifest = self.plan.statistics, self.scorer_manifest
        return {
            **self.windowing._asdict(),
            "windows_version": WINDOWS_VERSION,
            "min_context": statistics.min_context if statistics.scored else None,
            "mean_context": statistics.mean_context if statistics.scored else None,
            "scorer": {
                "checkpoint": str(self.scorer_path),
                "digest": self.settings["scorer_digest"],
                "step": manifest.step,
                "model": manifest.model.model_dump(mode="json", exclude_defaults=True),
                **{key: self.settings[key] for key in _ARITHMETIC},
            },
        }

    def finished(
        self, overwrite: bool = False, log: Callable[[str], None] = print
    ) -> SidecarManifest | None:
        """The manifest of the sidecar if it is there, whole, and made with these settings.

        InputError if it was made with others; with ``overwrite`` None then. A damaged one is named
        through ``log`` and counts as missing.
        """
        try:
            manifest = read_manifest(self.prefix, SidecarManifest)
            self._compare(Path(f"{self.prefix}.json"), _settings_of(manifest))
        except FileNotFoundError:
            return None
        except InputError:
            if overwrite:
                return None
            raise
        try:
            Sidecar(self.dataset, self.name)
        except InputError as error:
            log(f"made again: {error}")
            return None
        return manifest

    def shards(self, asked: int | None, ranks: int, overwrite: bool = False) -> int:
        """Into how many shards the work is split: as asked for, as begun, or as fits the work.

        InputError if it was begun with another number; with ``overwrite`` those files go.
        """
        if asked is not None and asked > _MOST_ASKED:
            raise InputError(f"{asked} shards: each is a file; give at most {_MOST_ASKED}")
        begun = {number for _, number in shard_files(self.folder).values()}
        if asked is None and len(begun) == 1:
            return begun.pop()
        if begun - {asked} and not overwrite:
            raise InputError(
                f"{self.folder}: holds finished shards of {_listed(begun)}, but "
                f"{asked or 'a new number of'} shards are asked for; go on with --shards "
                f"{max(begun)} (in a recipe scoring.shards), or begin anew with --overwrite "
                f"(in a recipe remove {self.folder} and launch again)"
            )
        for path, (_, number) in shard_files(self.folder).items():
            if number != asked:
                path.unlink(missing_ok=True)
        work = max(-(-self.plan.tokens // SHARD_TOKENS), 4 * ranks)
        return asked or max(1, min(work, self.plan.blocks, _MOST_SHARDS))

    def is_done(self, shard: int, shards: int, overwrite: bool, log: Callable[[str], None]) -> bool:
        """Whether the shard is finished. A damaged file is removed; so is, with ``overwrite``, one
        of other settings, which is an InputError otherwise."""
        path = shard_path(self.folder, shard, shards)
        if not path.exists():
            return False
        try:
            found = ShardReader(path).settings
        except InputError as error:
            log(f"scored again: {error}")
            path.unlink(missing_ok=True)
            return False
        try:
            self._compare(path, found)
        except InputError:
            if not overwrite:
                raise
            path.unlink(missing_ok=True)
            return False
        return True

    def finished_shards(self, shards: int) -> list[ShardReader]:
        """All shards, for the merge. InputError if one is missing, damaged or of other settings."""
        paths = [shard_path(self.folder, number, shards) for number in range(shards)]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        if missing:
            raise InputError(
                f"{self.folder}: {len(missing)} of {shards} shards are missing ({few(missing)}); "
                f"run tools/score.py without --merge, or with --shard {missing[0]}/{shards}"
            )
        readers = [ShardReader(path) for path in paths]
        for reader in readers:
            self._compare(reader.path, reader.settings)
        return readers

    def remove_shards(self) -> None:
        """After the merge. Shards of other settings, someone else's work, are left alone."""
        for path in shard_files(self.folder):
            with suppress(InputError, FileNotFoundError):  # a damaged one is of no use to anyone
                if ShardReader(path).settings != self.settings:
                    return
        remove_work_folder(self.folder)

    def _compare(self, path: Path, found: Settings) -> None:
        made = self.folder if path.parent == self.folder else path
        for key, expected in self.settings.items():
            if (was := found.get(key)) != expected:
                advice = "choose another --name (in a recipe scoring.name and data.scores)"
                if key in _ARITHMETIC and was:  # what is there need not be made again
                    advice = f"go on with --{key.replace('_', '-')} {was}, {advice}"
                raise InputError(
                    f"{path}: made with {key} {json.dumps(was)}, but {key} {json.dumps(expected)} "
                    f"is asked for; {advice}, or replace it with --overwrite (in a recipe remove "
                    f"{made} and launch again)"
                )

    def _check_name(self) -> None:
        """A corpus of tokens may have the name, with or without a manifest: never replaced."""
        found = stored_dtype(self.prefix)
        if found is not None and found.kind != "f":
            raise InputError(
                f"--name {self.name}: {data_path(self.prefix)} holds tokens, no sidecar; choose "
                f"another --name"
            )

    def _check_model(self) -> None:
        model, path = self.scorer_manifest.model, self.scorer_path
        check_model(model, self.layout)
        longest = longest_context(model)
        if longest is not None and self.windowing.window > longest:
            raise InputError(
                f"--window {self.windowing.window}: the scorer {path} was made for at most "
                f"{longest} tokens; choose a smaller window"
            )

    def _check_tokenizer(self) -> None:
        data = self.dataset.manifest.tokenizer
        scorer, path = self.scorer_manifest.tokenizer, self.scorer_path
        if scorer is None:
            raise InputError(
                f"{path}: does not say which tokenizer it was trained with, and {self.data} needs "
                f"{data.path} (digest {data.digest}); import it again together with its tokenizer"
            )
        if scorer["digest"] != data.digest:
            raise InputError(
                f"{path}: its tokenizer is {scorer.get('path')} (digest {scorer['digest']}), but "
                f"{self.data} was made with {data.path} (digest {data.digest}); use a scorer with "
                f"the tokenizer of the data"
            )
        self.dataset.check_bos(scorer, str(path))
        self.dataset.check_fits(self.scorer_manifest.model.vocab_size or 0, str(path))


def _settings_of(manifest: SidecarManifest) -> Settings:
    names = ("tokens_fingerprint", "tokenizer_digest", "windows_version", *Windowing._fields)
    return {
        **{name: getattr(manifest, name) for name in names},
        "scorer_digest": manifest.scorer.get("digest"),
        **{key: manifest.scorer.get(key) for key in _ARITHMETIC},
    }


def _listed(numbers: set[int]) -> str:
    return " and ".join(f"a run in {number} shards" for number in sorted(numbers))
