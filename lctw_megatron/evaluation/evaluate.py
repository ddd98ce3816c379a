"""Measure a checkpoint on held-out sequences and write evaluation.json."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lctw_megatron.atomic import write_json
from lctw_megatron.config.rope import longest_context
from lctw_megatron.config.schema import DataConfig, LayoutConfig
from lctw_megatron.data.batch import Sample
from lctw_megatron.data.sequence_source import SequenceSource
from lctw_megatron.data.sequences import evenly_spaced
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.held_out import check_long_enough
from lctw_megatron.evaluation.longppl import STRIDE, WINDOW, key_tokens, summary
from lctw_megatron.evaluation.probes import Probes, context_of, distance_of
from lctw_megatron.evaluation.result_file import FORMAT, read_evaluation
from lctw_megatron.evaluation.saved_result import still_holds, weights_identity
from lctw_megatron.model.checkpoint import (
    CheckpointManifest,
    agreed_checkpoint,
    find_checkpoint,
    read_manifest,
)
from lctw_megatron.ownership import sole_writer
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.world import first_rank_decides, join, on_first_rank
from lctw_megatron.progress import Progress
from lctw_megatron.scoring.windows import check_windows
from lctw_megatron.weighting.schemes import KEY_ALPHA, KEY_BETA

if TYPE_CHECKING:
    from lctw_megatron.evaluation.model_losses import ModelLosses


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, and how."""

    sequence_length: int | None = None
    """S; None: what the checkpoint was trained with."""
    max_sequences: int = 32
    window: int | None = None
    """K, the short context of LongPPL and of the gain; None: LongPPL's own (5,120 tokens, 1,024
    apart) if key_checkpoint is given, else neither."""
    stride: int | None = None
    """None: a quarter of the window."""
    near: int | None = None
    """Largest distance called near; None: the window, else a quarter of S."""
    key_checkpoint: str | None = None
    """The evaluator that picks LongPPL's key tokens; None: the measured model itself."""
    alpha: float = KEY_ALPHA
    beta: float = KEY_BETA
    tokens_per_forward: int | None = None


def evaluate_to_file(
    checkpoint: str | Path,
    prefix: str,
    output: str | Path,
    settings: EvaluationSettings,
    layout: LayoutConfig | None = None,
) -> str | None:
    """``evaluate``, written to ``output`` unless it is there already, weights that it lacked
    included; a line that says so, on the first rank. All ranks call it."""
    first = join(layout or LayoutConfig())
    with ExitStack() as held:

        def survey() -> dict[str, Any] | None:
            """The result if it is there; else its file is ours to write."""
            place, manifest = _look(checkpoint)
            completed = complete(settings, place, manifest)
            described = describe(completed, place, TokenDataset(prefix))
            found = read_evaluation(output)
            if still_holds(output, found and found["settings"], described):
                return found
            held.enter_context(sole_writer(Path(output), print))
            return None

        result = first_rank_decides(survey)
        if result is None:
            result = evaluate(checkpoint, prefix, settings, layout)
            measured = result
            on_first_rank(lambda: write_json(output, measured))
        elif isinstance(result.get("weights"), str):
            result = _with_weights(result, checkpoint, output, layout, settings.tokens_per_forward)
    return summary_line(output, result) if first else None


def _with_weights(
    result: dict[str, Any],
    checkpoint: str | Path,
    output: str | Path,
    layout: LayoutConfig | None,
    tokens_per_forward: int | None,
) -> dict[str, Any]:
    """``result``, which says why it has no weights, with weights or what is the reason now; written
    to ``output`` if that is another."""
    from lctw_megatron.evaluation.model_losses import ModelLosses
    from lctw_megatron.evaluation.weight_sample import sample_or_reason

    place, manifest = agreed_checkpoint(checkpoint)
    asked = result["settings"]

    def load() -> ModelLosses:
        length = asked["sequence_length"]
        return ModelLosses(place, layout or LayoutConfig(), length, tokens_per_forward)

    weights = sample_or_reason(place, manifest, asked["near"], asked["max_sequences"], load)
    if weights == result["weights"]:
        return result
    changed = result | {"weights": weights}

    def write() -> None:
        with sole_writer(Path(output), print):
            write_json(output, changed)

    on_first_rank(write)
    return changed


def summary_line(output: str | Path, result: dict[str, Any]) -> str:
    """The losses in one line."""
    classes = result["classes"]
    parts = [
        f"{name.replace('_', ' ')} {loss:.4f}"
        for name, loss in zip(classes["bins"], classes["loss"], strict=True)
        if loss is not None
    ]
    short = result.get("short") or {}  # files of before have none
    if short.get("loss") is not None:
        parts.append(f"first {short['length']:,} tokens {short['loss']:.4f}")
    found = result.get("longppl") or {}
    if found.get("longppl") is not None:
        parts.append(f"LongPPL {found['longppl']:.2f} on {found['key_tokens']:,} key tokens")
    targets = f"{result['targets']:,} targets of {len(result['sequences'])} sequences"
    return f"{output}: loss {result['loss']:.4f} nats a target ({', '.join(parts)}), {targets}"


def evaluate(
    checkpoint: str | Path,
    prefix: str,
    settings: EvaluationSettings,
    layout: LayoutConfig | None = None,
) -> dict[str, Any]:
    """Measure ``checkpoint`` on the held-out dataset ``prefix``; see ``result_file.FORMAT``.

    checkpoint: a checkpoint folder or a run folder. All ranks call it, all get the result. Raises
    InputError for whatever does not fit.
    """
    from lctw_megatron.evaluation.model_losses import ModelLosses, check_data
    from lctw_megatron.evaluation.weight_sample import sample_or_reason

    layout = layout or LayoutConfig()
    join(layout)
    asked = settings

    def begin() -> tuple[Path, EvaluationSettings, dict[str, Any]]:
        place, manifest = _look(checkpoint)
        completed, dataset = complete(asked, place, manifest), TokenDataset(prefix)
        length, models = completed.sequence_length, [(place, manifest)]
        assert length
        if completed.key_checkpoint:
            models.append(_look(completed.key_checkpoint))
        for at, of in models:
            check_data(at, of, dataset)
            if (made_for := longest_context(of.model)) and length > made_for:
                print(f"{length} tokens are more than {made_for}, what {at} is made for")
        open_held_out(prefix, length)  # refused once, and its index made once
        return place, completed, describe(completed, place, dataset)

    place, settings, described = first_rank_decides(begin)
    assert settings.sequence_length and settings.near
    length = settings.sequence_length
    source = open_held_out(prefix, length)
    numbers = evenly_spaced(len(source), settings.max_sequences)
    losses = np.full((len(numbers), length), np.nan, dtype=np.float32)
    keys = np.zeros(losses.shape, dtype=bool)
    if settings.key_checkpoint:
        keys = _key_tokens(settings, layout, source, numbers)

    model = ModelLosses(place, layout, length, settings.tokens_per_forward)
    if model.world.is_first:
        print(capabilities().line(), flush=True)
    probes = Probes(len(numbers), length, settings.near)
    for row, sample, long_loss, short_loss in read_losses(model, source, numbers, settings):
        probes.add(row, long_loss, short_loss, context_of(sample), distance_of(sample))
        losses[row] = long_loss
        if short_loss is not None and not settings.key_checkpoint:
            keys[row] = key_tokens(long_loss, short_loss, settings.alpha, settings.beta)
    flat = losses[~np.isnan(losses)]
    result: dict[str, Any] = {
        "format": FORMAT,
        "settings": described,
        "sequences": [list(source.index.pieces(number)[0][:2]) for number in numbers],
        "loss": float(flat.mean(dtype=np.float64)),
        "targets": len(flat),
        **probes.summary(with_gain=settings.window is not None),
    }
    if settings.window:
        result["longppl"] = summary(losses, keys) | {
            "evaluator": settings.key_checkpoint or "the measured model itself"
        }
    result["weights"] = sample_or_reason(
        place, model.manifest, settings.near, settings.max_sequences, lambda: model
    )
    model.free()
    return result


def _look(checkpoint: str | Path) -> tuple[Path, CheckpointManifest]:
    place = find_checkpoint(checkpoint)
    return place, read_manifest(place)


def complete(
    settings: EvaluationSettings, checkpoint: Path, manifest: CheckpointManifest
) -> EvaluationSettings:
    """``settings`` with what follows from the checkpoint and from each other. InputError."""
    length = settings.sequence_length
    if length is None:
        run = manifest.run
        length = run.data.sequence_length if run else manifest.model.max_position_embeddings
    if length is None:
        raise InputError(f"{checkpoint}: does not say its sequence length; give --sequence-length")
    for name in ("alpha", "beta"):
        if not math.isfinite(value := getattr(settings, name)):
            raise InputError(f"--{name} is {value}, expected a finite number of nats")
    window, stride = settings.window, settings.stride
    if settings.key_checkpoint and not window:
        window, stride = WINDOW, stride or STRIDE
    if window:
        stride = stride or max(1, window // 4)
        check_windows(window, stride, length)
    elif stride:
        raise InputError("--stride has no meaning without --window; give the short context's size")
    else:
        for name, usual in (("alpha", KEY_ALPHA), ("beta", KEY_BETA)):
            if getattr(settings, name) != usual:
                raise InputError(
                    f"--{name} has no meaning without --window or --key-checkpoint, as no key "
                    f"tokens are picked; give one of them"
                )
    return replace(
        settings,
        sequence_length=length,
        window=window,
        stride=stride,
        near=settings.near or window or max(1, length // 4),
    )


def describe(
    settings: EvaluationSettings, checkpoint: Path, dataset: TokenDataset
) -> dict[str, Any]:
    """Everything the result depends on."""
    described: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "weights": weights_identity(checkpoint),
        "data": dataset.prefix,
        "tokens_fingerprint": dataset.fingerprint,
        **asdict(settings),
    }
    del described["tokens_per_forward"]
    key = settings.key_checkpoint
    return described | {"key_weights": weights_identity(find_checkpoint(key)) if key else None}


def open_held_out(prefix: str, sequence_length: int) -> SequenceSource:
    """The full sequences of a held-out dataset. InputError if no document is long enough.

    Shorter last chunks of documents are left out: all their targets have little context.
    """
    check_long_enough(TokenDataset(prefix), sequence_length)
    data = DataConfig(train=[], sequence_length=sequence_length, packing="chunk", tails="drop")
    return SequenceSource(prefix, data, cache_setting=None)


class ReadLosses(NamedTuple):
    """One sequence and what a model gives it."""

    row: int
    """Which of the chosen sequences it is."""
    sample: Sample
    long_loss: np.ndarray
    """float32 [S], nats; NaN where there is no target."""
    short_loss: np.ndarray | None
    """Likewise, NaN also where not scored; None without a window."""


def read_losses(
    model: "ModelLosses",
    source: SequenceSource,
    numbers: list[int],
    settings: EvaluationSettings,
    label: str = "evaluate",
) -> Iterator[ReadLosses]:
    """The sequences ``numbers`` of ``source`` with their losses under ``model``."""
    assert settings.sequence_length
    at_once = model.sequences_at_once(settings.sequence_length)
    stream = model.world.progress_stream
    with Progress(label, len(numbers), "sequences", stream=stream) as progress:
        for begin in range(0, len(numbers), at_once):
            samples = [source.read(number) for number in numbers[begin : begin + at_once]]
            long_loss = model.losses(samples)
            short_loss = None
            if settings.window and settings.stride:
                short_loss = model.short_losses(
                    samples, settings.window, settings.stride, source.tokenizer.first_id
                )
            for i, sample in enumerate(samples):
                short_row = None if short_loss is None else short_loss[i]
                yield ReadLosses(begin + i, sample, long_loss[i], short_row)
            progress.update(len(samples), tokens=long_loss.size)


def _key_tokens(
    settings: EvaluationSettings, layout: LayoutConfig, source: SequenceSource, numbers: list[int]
) -> np.ndarray:
    """bool [N, S]: the key tokens under the evaluator."""
    from lctw_megatron.evaluation.model_losses import ModelLosses

    assert settings.key_checkpoint and settings.sequence_length
    keys = np.zeros((len(numbers), settings.sequence_length), dtype=bool)
    evaluator = ModelLosses(
        settings.key_checkpoint, layout, settings.sequence_length, settings.tokens_per_forward
    )
    for read in read_losses(evaluator, source, numbers, settings, "key tokens"):
        assert read.short_loss is not None
        keys[read.row] = key_tokens(read.long_loss, read.short_loss, settings.alpha, settings.beta)
    evaluator.free()
    return keys
