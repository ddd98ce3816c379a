"""What a run says of itself before its first step."""

from collections.abc import Iterator
from pathlib import Path

from lctw_megatron.config.rope import rope_line
from lctw_megatron.config.schema import RunConfig, TrainingConfig
from lctw_megatron.config.schemes import needs_short_loss
from lctw_megatron.data.loader import TokenLoader
from lctw_megatron.model.checkpoint import read_manifest
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.flight_recorder import recorder_line
from lctw_megatron.platform.world import World
from lctw_megatron.training.estimate import recompute_lines
from lctw_megatron.training.optimizer import learning_rate


def first_lines(
    run: RunConfig, start: Path | None, world: World, loader: TokenLoader, done: int
) -> Iterator[str]:
    """The machine, what of the recipe does not act, and what is about to be trained, ``done`` steps
    being behind it. start: the checkpoint that it began with, if any."""
    yield capabilities().line()
    if line := recorder_line():
        yield line
    yield from recompute_lines(run)
    if run.model.attention == "te" and run.training.precision == "fp32":
        yield (
            "model.attention te: float32 takes our layers, as TransformerEngine multiplies it in "
            "TF32"
        )
    yield from unreached_lines(run.training)
    yield f"rope: {_rope(run, start)}"
    yield from loader.packing_cost_lines() + loader.scores_lines()
    yield (
        f"{run.name}: steps {done}..{run.training.steps}, {world.size} ranks, "
        f"{loader.microbatches} micro batches of {run.training.micro_batch_size} x "
        f"{run.data.sequence_length} tokens a step and rank, weighting {run.weighting.scheme}"
        + (f" ({run.weighting.mode})" if needs_short_loss(run.weighting.scheme) else "")
    )


def unreached_lines(training: TrainingConfig) -> Iterator[str]:
    """What of ``training`` lies beyond its steps."""
    steps = training.steps
    if training.warmup_steps > steps:
        yield (
            f"training.warmup_steps {training.warmup_steps}: more than training.steps {steps}, so "
            f"the rate ends at {learning_rate(training, steps - 1):.3g} and never reaches "
            f"training.lr {training.lr:.3g}"
        )
    intervals = {name: getattr(training, name) for name in ("eval_interval", "save_interval")}
    intervals["keep_every"] = training.keep_every
    intervals["recall.every"] = training.recall and training.recall.every
    for name, interval in intervals.items():
        if interval and interval > steps:
            yield f"training.{name} {interval}: more than training.steps {steps}"


def _rope(run: RunConfig, start: Path | None) -> str:
    """Of the model that is trained, and of what it starts from where that is another."""
    ours = rope_line(run.model)
    before = rope_line(read_manifest(start).model) if start else ours
    return ours if before == ours else f"{before} -> {ours}"
