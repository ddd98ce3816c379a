"""From a corpus to a token dataset: shards tokenised by several processes, merged in order.

Work in progress lies in PREFIX.shards: one folder a shard, and what the merge writes. A run that
was killed is continued by the next one with the same settings, which takes the finished shards.
The result appears at the end, its manifest last, and PREFIX.shards goes. The bytes of the result
depend on corpus and settings only, not on the number of processes or restarts.

Memory is bounded by the largest document, times the number of processes (with a SentencePiece
model about 25 bytes a byte of it, with a Hugging Face tokenizer about 150); disk use beside the
result by once more its size.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lctw_megatron.atomic import atomic_file
from lctw_megatron.config.schema import PrepareConfig
from lctw_megatron.data.manifest import (
    TokenizerIdentity,
    TokenManifest,
    check_prefix,
    files_of,
    read_manifest,
)
from lctw_megatron.data.preprocessing.corpus import (
    STDLIB,
    CorpusFile,
    PassedOver,
    Shard,
    find_files,
    is_there,
    plan_shards,
)
from lctw_megatron.data.preprocessing.merge_shards import merge_shards, publish
from lctw_megatron.data.preprocessing.our_files import VALIDATION
from lctw_megatron.data.preprocessing.shard_pool import tokenise_shards
from lctw_megatron.data.preprocessing.steady_corpus import unchanged
from lctw_megatron.data.preprocessing.token_shard import ShardSettings, shard_key
from lctw_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.ownership import owned
from lctw_megatron.progress import clock, human
from lctw_megatron.work_folder import MARK, make_work_folder, remove, remove_work_folder

_WORTH_KEEPING_SECONDS = 60.0
"""After an error, what took less time is made anew, unless an earlier run had left some shards."""
_PUBLISHING = "publishing"
"""In PREFIX.shards from the moment on at which the result begins to appear at PREFIX."""


def preprocess(config: PrepareConfig, window: int | None = None) -> TokenManifest:
    """Make PREFIX.bin, .idx and .json, and what else ``config`` asks for; return the manifest.

    Does nothing if they are there already, from the same corpus with the same settings. Raises
    InputError for what the user can mend; then nothing of the result is there. ``window``: of the
    scoring to come; a line says if no document is longer.
    """
    start = time.monotonic()
    prefix = config.output_prefix
    _check(config)
    given = load_tokenizer(config.tokenizer).identity if config.tokenizer else None
    if given and not given.add_eos:
        print(f"{config.tokenizer}: names no EOS, so documents end without one", flush=True)
    passed_over = PassedOver()
    files = find_files(config.inputs, prefix, passed_over)
    if passed_over.paths:
        print(f"{prefix}: read {len(files)} files, passed over {passed_over}", flush=True)
    shards = plan_shards(files)
    wanted = _request(config, files, given)
    found = _finished(config, wanted)
    if found is not None:
        print(f"{prefix}: already there, from the same corpus with the same settings")
        _say_if_all_shorter(prefix, window)
        if _work_path(prefix).exists():  # a run was killed between the result and its end
            with contextlib.suppress(InputError, OSError), _work_folder(prefix):
                pass
        return found
    _refuse_foreign(config)
    before = _made_here(prefix)
    if before and before.get("request") != wanted:
        print(f"{prefix}: was made of other text or with other settings, will be replaced")
    settings = ShardSettings(
        config.text_field, config.skip_bad, config.max_bytes, config.max_document_bytes
    )
    with _work_folder(prefix) as work:
        held_out = config.validation_documents
        merged = str(work / "merged")
        with unchanged(files):
            model = config.tokenizer or _trained_model(config, settings, shards, wanted, work)
            tokenizer = given or load_tokenizer(model).identity
            folders = [work / shard_key(shard, settings, tokenizer) for shard in shards]
            names = {folder.name for folder in folders}
            if others := _finished_names(work) - names:  # it may be our option that is mistyped
                print(f"{work}: {len(others)} shards of other settings or text stay until the end")
            _remove_others(work, names | others | {os.path.basename(model)})
            results = tokenise_shards(shards, folders, settings, model, config.workers)
            if given is None:
                tokenizer = tokenizer.model_copy(update={"path": _model_path(prefix)})
            source = _source(config, files, wanted)
            merge_shards(shards, folders, results, settings, tokenizer, source, held_out, merged)
        (work / _PUBLISHING).touch()
        if given is None:
            os.replace(model, _model_path(prefix))
        publish(merged, prefix)
    manifest = TokenDataset(prefix).manifest
    print(_summary(prefix, manifest, held_out, time.monotonic() - start))
    _say_if_all_shorter(prefix, window)
    return manifest


def request_now(config: PrepareConfig) -> str | None:
    """What a result made now has as `source.request` in its manifest, for who wants to know whether
    the one that is there is of this corpus, tokenizer and settings, from names, sizes and times.

    None if that cannot be told from here: nothing of the corpus, or no tokenizer, is there any more
    or may be read; or it is `stdlib`, which is another in the container of a job. Raises InputError
    for what ``preprocess`` refuses.
    """
    if STDLIB in config.inputs or not any(map(is_there, config.inputs)):
        return None
    if config.tokenizer and not os.path.exists(config.tokenizer):
        return None
    try:
        files = find_files(config.inputs, config.output_prefix)
        given = load_tokenizer(config.tokenizer).identity if config.tokenizer else None
    except OSError:
        return None
    return _request(config, files, given)


def _say_if_all_shorter(prefix: str, window: int | None) -> None:
    longest = int(TokenDataset(prefix).lengths.max()) if window else 0
    if window and longest <= window + 1:
        print(
            f"{prefix}: no document is longer than a window and its last target ({window + 1} "
            f"tokens, the longest has {longest}): none of it could be scored, and weighting "
            "that compares contexts would train as uniform; take longer documents or a smaller "
            "window"
        )


def _check(config: PrepareConfig) -> None:
    check_prefix(config.output_prefix)
    if (config.tokenizer is None) == (config.train_sentencepiece is None):
        both = "both" if config.tokenizer else "neither"
        raise InputError(
            f"tokenizer and train_sentencepiece: {both} given; give either --tokenizer "
            f"MODEL_OR_DIR or --train-sentencepiece VOCAB"
        )
    if not config.inputs:
        raise InputError("inputs: none given; name files, folders or globs with --input")
    for option, path in (("output-prefix", config.output_prefix), ("tokenizer", config.tokenizer)):
        place = os.path.abspath(path or "")
        if place.encode(errors="ignore").decode() != place:
            raise InputError(
                f"--{option} {path}: is in {ascii(place)}, a name that is not UTF-8, which no "
                "manifest can hold; work in a folder with another name"
            )


def _request(
    config: PrepareConfig, files: Sequence[CorpusFile], tokenizer: TokenizerIdentity | None
) -> str:
    """Digest of all that decides the result: the corpus and the settings."""
    decides = [
        [dataclasses.astuple(file) for file in files],
        tokenizer.model_dump(exclude={"path"}) if tokenizer else config.train_sentencepiece,
        config.text_field,
        config.skip_bad,
        config.max_bytes,
        config.max_document_bytes,
        config.validation_documents,
    ]
    return hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).hexdigest()


def _finished(config: PrepareConfig, wanted: str) -> TokenManifest | None:
    """The manifest of a whole result of the same request; None if there is none."""
    prefix = config.output_prefix
    try:
        manifest = TokenDataset(prefix).manifest
        if manifest.source.get("request") != wanted:
            return None
        if config.train_sentencepiece:
            found = load_tokenizer(_model_path(prefix)).identity
            if found.digest != manifest.tokenizer.digest:
                return None
        if count := manifest.source.get("held_out"):
            held_out = TokenDataset(prefix + VALIDATION).manifest
            with open(_held_out_text(prefix), "rb") as text:
                whole = sum(line.endswith(b"\n") for line in text) == count
            if held_out.source.get("request") != wanted or not whole:
                return None
    except (InputError, FileNotFoundError):
        return None
    return manifest


def _refuse_foreign(config: PrepareConfig) -> None:
    """InputError if a file would be replaced or removed that was not made here: a user's own text,
    Megatron's dataset, a validation dataset that was made by itself. What lies there of a run that
    was killed while its result appeared is that run's."""
    prefix = config.output_prefix
    if (_work_path(prefix) / _PUBLISHING).exists():
        return
    source, held_out = _made_here(prefix), _made_here(prefix + VALIDATION)
    # Either of both may have lost its manifest.
    ours = "documents" in held_out
    foreign = [] if source or ours else files_of(prefix)
    if not source.get("held_out") and not ours:
        foreign += [*files_of(prefix + VALIDATION), str(_held_out_text(prefix))]
    if config.train_sentencepiece and not source.get("train_sentencepiece"):
        foreign.append(_model_path(prefix))
    for path in filter(os.path.exists, foreign):
        raise InputError(
            f"{path}: was not made by an earlier run with this --output-prefix, and would be "
            "replaced or removed; choose another --output-prefix, or remove it"
        )


def _made_here(prefix: str) -> dict[str, Any]:
    """What the dataset at ``prefix`` was made from by this module; empty if it was not."""
    try:
        source = read_manifest(prefix, TokenManifest).source
    except (InputError, OSError):
        return {}
    return source if "request" in source or "choice" in source else {}


def _held_out_text(prefix: str) -> Path:
    return Path(prefix + VALIDATION + ".jsonl")


def _work_path(prefix: str) -> Path:
    return Path(os.path.abspath(prefix) + ".shards")


@contextlib.contextmanager
def _work_folder(prefix: str) -> Iterator[Path]:
    """PREFIX.shards, locked. It goes when all is done, and after an error too, unless it holds
    finished shards of runs that lasted a while."""
    start = time.monotonic()
    work = _work_path(prefix)
    make_work_folder(work)
    with owned(work / "lock", prefix):
        before = _finished_names(work)
        try:
            yield work
        except BaseException as error:
            _clear(work, before, time.monotonic() - start)
            full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if isinstance(error, OSError) and error.errno in full:
                error.filename = str(work)  # not one of its files, whose names are random
            if isinstance(error, InputError) and work.exists():
                raise InputError(
                    f"{error}; the next run takes what is finished in {work}"
                ) from None
            raise
        remove_work_folder(work)


def _clear(work: Path, before: set[str], seconds: float) -> None:
    """Remove what is unfinished, and the folder if no shard is left of ``before`` or took long."""
    finished = _finished_names(work)
    if finished & before or (finished and seconds >= _WORTH_KEEPING_SECONDS):
        _remove_others(work, finished)
    else:
        remove_work_folder(work)


def _finished_names(work: Path) -> set[str]:
    return {path.parent.name for path in work.glob("[!.]*/shard.json")}


def _remove_others(work: Path, names: set[str]) -> None:
    """Remove all but ``names``: half-written files of killed runs."""
    for path in work.iterdir():
        if path.name in names or path.name in ("lock", MARK, _PUBLISHING):
            continue
        remove(path)


def _model_path(prefix: str) -> str:
    return os.path.abspath(prefix) + ".tokenizer.model"


def _trained_model(
    config: PrepareConfig,
    settings: ShardSettings,
    shards: Sequence[Shard],
    wanted: str,
    work: Path,
) -> str:
    """Path of the SentencePiece model trained for this request, by an earlier run or now."""
    path = work / f"{wanted}.model"
    if not path.exists():
        assert config.train_sentencepiece is not None
        sampled = _first(shards, config.max_bytes)
        model = train_sentencepiece(sampled, config.train_sentencepiece, settings, str(work))
        with atomic_file(path) as file:
            file.write(model)
    return str(path)


def _first(shards: Sequence[Shard], max_bytes: int | None) -> list[Shard]:
    """The shards at the beginning that make up ``max_bytes``."""
    chosen: list[Shard] = []
    weight = 0
    for shard in shards:
        if max_bytes and weight >= max_bytes:
            break
        chosen.append(shard)
        weight += sum(part.weight for part in shard)
    return chosen


def _source(config: PrepareConfig, files: Sequence[CorpusFile], wanted: str) -> dict[str, Any]:
    return {
        "inputs": config.inputs,
        "files": len(files),
        "text_field": config.text_field,
        "max_bytes": config.max_bytes,
        "train_sentencepiece": config.train_sentencepiece,
        "request": wanted,
    }


def _summary(prefix: str, manifest: TokenManifest, held_out: int, seconds: float) -> str:
    size, tokens = manifest.source["bytes"], manifest.tokens
    parts = [
        f"{manifest.documents} documents",
        f"{human(tokens)} tokens",
        f"{human(size)} bytes of text ({size / tokens:.2f} a token)",
    ]
    if held_out:
        parts.append(f"{held_out} more documents held out in {prefix}{VALIDATION}")
    for name in ("skipped", "empty"):
        if manifest.source[name]:
            parts.append(f"{manifest.source[name]} {name}")
    return f"{prefix}: " + ", ".join(parts) + f", in {clock(seconds)}"
