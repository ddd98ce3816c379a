"""The training loop: build, resume, then step by step until the end or a signal.

Read `train` first; everything else in this folder is one of its lines.
"""

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from lctw_megatron.config.layout_rules import check_layout
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.config.schemes import needs_short_loss
from lctw_megatron.data.loader import TokenLoader
from lctw_megatron.data.sequence_source import check_one_tokenizer
from lctw_megatron.data.validation import ValidationLoader
from lctw_megatron.errors import InputError
from lctw_megatron.model import spec
from lctw_megatron.model.checkpoint import TOKENIZER, CheckpointManifest, load_weights
from lctw_megatron.model.gpt import build_model
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.compile_cache import keep_compiled
from lctw_megatron.platform.flight_recorder import make_place, record_into, write_record
from lctw_megatron.platform.gpu import use_deterministic_kernels
from lctw_megatron.platform.rank_memory import least_usable_memory
from lctw_megatron.platform.world import first_rank_decides, initialize, on_first_rank
from lctw_megatron.progress import Progress
from lctw_megatron.training import flops
from lctw_megatron.training.checkpoint import (
    CheckpointWriter,
    newest_checkpoint,
    resume,
    run_state,
)
from lctw_megatron.training.compatibility import check_unchanged, complete_run
from lctw_megatron.training.exit_status import REQUEUE_STATUS
from lctw_megatron.training.first_lines import first_lines
from lctw_megatron.training.hang_watch import HangWatch
from lctw_megatron.training.heartbeat import Heartbeat
from lctw_megatron.training.loss_spike import SpikeWatch
from lctw_megatron.training.metrics import MetricsLog, peak_memory_gib
from lctw_megatron.training.micro_batch import choose_micro_batch, with_micro_batch
from lctw_megatron.training.nonfinite import NonFinite, write_nonfinite
from lctw_megatron.training.optimizer import build_optimizer, gather_weights, wrap_data_parallel
from lctw_megatron.training.recall import TrainingRecall
from lctw_megatron.training.run_folder import one_run_in, write_settings
from lctw_megatron.training.signals import StopRequest
from lctw_megatron.training.start_clock import StartClock
from lctw_megatron.training.step import Stepper
from lctw_megatron.training.straggler import StragglerWatch
from lctw_megatron.training.tokenizer_folder import TokenizerFolder
from lctw_megatron.training.trackers import check_trackers, open_trackers


def train(
    run: RunConfig, allow_changes: bool = False, check: Callable[[], None] = lambda: None
) -> int:
    """Train ``run`` to its last step, from its newest checkpoint if there is one.

    All ranks call it. allow_changes: resume although settings have changed that otherwise may not.
    check: asked of the first rank, before the data. Returns 0, or REQUEUE_STATUS after a signal.
    """
    clock = StartClock()
    clock.end("import")
    use_deterministic_kernels(run.training.deterministic)
    record_into(Path(run.run_dir))
    keep_compiled(Path(run.run_dir))
    initialize(run.layout, run.seed, run.training.distributed_timeout_minutes)
    on_first_rank(lambda: check_trackers(run.training.trackers))
    on_first_rank(check)
    with one_run_in(Path(run.run_dir)):
        clock.end("process groups")
        trainer = Trainer(run, allow_changes, clock)
        try:
            make_place()
            return trainer.run_to_end()
        finally:
            trainer.close()


class Trainer:
    """One run on this rank."""

    def __init__(
        self, run: RunConfig, allow_changes: bool = False, clock: StartClock | None = None
    ) -> None:
        self.clock = clock = clock or StartClock()
        self.world = world = initialize(
            run.layout, run.seed, run.training.distributed_timeout_minutes
        )
        check_layout(run, self.world.size)
        self.heart = Heartbeat(Path(run.run_dir)) if self.world.is_first else None
        self.hang = HangWatch(
            run.training.hang_minutes, self.world.rank, lambda: write_record(self.world.rank)
        )
        self.loader = self._open_data(run)
        source = self.loader.sources[0]
        asked, tokenizer = run, source.tokenizer
        folder = Path(run.run_dir) / "checkpoints"
        own = newest_checkpoint(folder, self.print_rank_0)
        run, start, self.begun_with = first_rank_decides(
            lambda: complete_run(asked, source.dataset, own)
        )
        self.start = start
        memory = 0 if run.training.micro_batch_size else least_usable_memory(world.device)
        size = choose_micro_batch(run, world.size, memory, own and own[1], world.device.type)
        self.config = run = with_micro_batch(run, size)
        check_layout(run, self.world.size)
        self.loader.cut(size)
        if run.training.eval_interval:
            _ = self.validation  # refused now, not at its first step
        clock.end("data index")
        files = on_first_rank(lambda: TokenizerFolder(tokenizer, start and start / TOKENIZER))
        # Not before: nothing is to be in the folder of a run whose data are refused.
        self._now("starting", own[1].step if own else 0)
        self.chunks = build_model(
            run.model,
            run.layout,
            max_sequence_length=run.data.sequence_length,
            dtype=spec.DTYPES[run.training.precision],
            device=self.world.device,
            seed=None if run.start or own else run.seed,
            packed=run.data.packing == "pack",
            fields=run.megatron.transformer,
            kind=run.megatron.model,
        )
        self.wrapped = wrap_data_parallel(self.chunks, run.megatron.ddp)
        if start is not None and own is None:
            load_weights(self.chunks, start)
        clock.end("weights")
        self.optimizer = build_optimizer(self.wrapped, run.training, run.megatron.optimizer)
        self.first_step = 0
        if own is not None:
            path, manifest = own
            if manifest.loader is not None:
                self.loader.load_state_dict(manifest.loader, allow_changes)
            begun = self.begun_with
            on_first_rank(lambda: check_unchanged(run, manifest, begun, allow_changes))
            resume(path, manifest, self.chunks, self.optimizer, allow_changes)
            self.first_step = manifest.step
        clock.end("optimizer")
        self.log = on_first_rank(self._open_log)
        self.stepper = Stepper(run, self.wrapped, self.optimizer, tokenizer.first_id)
        self.writer = CheckpointWriter(
            folder,
            run.training.keep_last,
            run.training.keep_every,
            run.training.async_save,
            on_first_rank(lambda: files.write(Path(run.run_dir) / TOKENIZER) if files else None),
            before=lambda: self.log.sync() if self.log is not None else None,
        )
        if own is not None:
            on_first_rank(lambda: self.writer.apply_retention(self.first_step))
        self.recall = TrainingRecall(run, tokenizer, start) if run.training.recall else None
        self.stop = StopRequest(self.world.device)
        self.spikes = SpikeWatch()
        self.stragglers = StragglerWatch(self.world.device)
        self.skipped = own[1].skipped if own else 0

    def run_to_end(self) -> int:
        """Steps until the last one (0) or a signal (REQUEUE_STATUS)."""
        training = self.config.training
        done = self.first_step
        lines = first_lines(self.config, self.start, self.world, self.loader, done)
        on_first_rank(lambda: print(*lines, sep="\n", flush=True))  # which looks at the start
        if done > training.steps:
            self.print_rank_0(f"already past training.steps {training.steps}: at step {done}")
            return 0
        self.clock.end("logs")
        stream = self.world.progress_stream
        with Progress(self.config.name, training.steps, "steps", done, stream) as progress:
            for step in range(done, training.steps):
                self._now("training", step)
                started = time.perf_counter()
                batches = list(self.loader.step(step))
                fetched = time.perf_counter()
                try:
                    metrics = self.stepper.step(step, batches)
                except NonFinite as error:
                    metrics = self._skip_or_stop(error)
                seconds = time.perf_counter() - started
                metrics |= self._speed(seconds)
                if step == self.first_step:
                    self._started()
                if self._logs(step):
                    metrics |= self.stragglers.look(fetched - started, seconds)
                    progress.note(self.stragglers.note)
                done = step + 1
                if training.eval_interval and done % training.eval_interval == 0:
                    self._now("evaluating", done)
                    metrics |= self.evaluate()
                if self.recall and done % self.recall.config.every == 0:
                    self._now("evaluating", done)
                    metrics |= self.recall(self.wrapped, self.world)
                self._watch(step, metrics)
                self._write(step, metrics)
                progress.update(1, tokens=self.tokens_per_step)
                leave = self.stop.agreed()
                saves = training.save_interval and done % training.save_interval == 0
                if leave or saves or done == training.steps:
                    self._now("saving", done)
                    self.save(done)
                self.writer.finish(blocking=False)
                if leave and done < training.steps:
                    self.writer.finish()
                    self.print_rank_0(
                        f"asked to stop: saved after step {done}, start again to go on"
                    )
                    return REQUEUE_STATUS
        self.writer.finish()
        return 0

    def evaluate(self) -> dict[str, float]:
        """Plain losses on the validation data."""
        losses = self.stepper.evaluate(list(self.validation))
        return {f"validation/{name}": value for name, value in losses.items()}

    @cached_property
    def validation(self) -> ValidationLoader:
        run, world = self.config, self.world
        loader = ValidationLoader(
            run.data,
            sequences=run.training.eval_sequences,
            micro_batch_size=self.loader.micro_batch_size,
            dp_rank=world.data_rank,
            dp_size=world.data_size,
            cp_rank=world.context_rank,
            cp_size=run.layout.context,
            vocab_size=run.model.vocab_size,
            # The interleaved schedule takes its micro batches in rounds of the stages.
            multiple=run.layout.pipeline if run.layout.virtual_pipeline else 1,
        )
        check_one_tokenizer([self.loader.sources[0], *loader.sources])
        return loader

    def save(self, step: int) -> None:
        """Write the checkpoint after ``step`` steps."""
        gather_weights(self.wrapped)
        manifest = CheckpointManifest(
            step=step,
            model=self.config.model,
            dtype=self.config.training.precision,
            tokenizer=self.loader.sources[0].tokenizer.model_dump(mode="json"),
            run=self.config,
            start=self.begun_with,
            skipped=self.skipped,
            ranks=self.world.size,
            loader=self.loader.state_dict(),
            optimizer=True,
            machine=capabilities().line(),
        )
        self.writer.save(run_state(self.chunks, self.optimizer), manifest)

    def close(self) -> None:
        self.hang.close()
        self.writer.close()
        self.loader.close()
        self.stop.close()
        if self.log is not None:
            self.log.close()

    def _now(self, stage: str, step: int) -> None:
        """The run begins with ``stage`` of training.heartbeat, ``step`` steps being done."""
        if stage != "starting":  # which takes as long as the data and the disk need
            self.hang.progress(f"{stage}, {step} steps done")
        if self.heart is not None:
            self.heart.beat(stage, step)

    def print_rank_0(self, line: str) -> None:
        """A line for the log, from the first rank only."""
        if self.world.is_first:
            print(line, flush=True)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.data.sequence_length

    def _open_data(self, run: RunConfig) -> TokenLoader:
        world, weighting = self.world, run.weighting
        compares = needs_short_loss(weighting.scheme)
        return TokenLoader(
            run.data,
            seed=run.seed,
            global_batch_size=run.training.global_batch_size,
            micro_batch_size=run.training.micro_batch_size or 1,
            dp_rank=world.data_rank,
            dp_size=world.data_size,
            cp_rank=world.context_rank,
            cp_size=run.layout.context,
            scores=compares and weighting.mode == "frozen",
            window=weighting.window if compares else None,
            stride=weighting.stride,
            vocab_size=run.model.vocab_size,
        )

    def _open_log(self) -> MetricsLog:
        write_settings(self.config, self.first_step)
        return MetricsLog(
            Path(self.config.run_dir),
            self.first_step,
            self.config.training.tensorboard,
            capabilities().line(),
            open_trackers(self.config) if self.first_step < self.config.training.steps else [],
        )

    def _logs(self, step: int) -> bool:
        training = self.config.training
        return step % training.log_interval == 0 or step == training.steps - 1

    def _speed(self, seconds: float) -> dict[str, float]:
        work = flops.step_flops(self.config)
        return {
            "speed/tokens_per_second": self.tokens_per_step / seconds,
            "speed/tflops_per_rank": work / seconds / self.world.size / 1e12,
            "speed/seconds": seconds,
            "memory/peak_gib": peak_memory_gib(self.world.device),
        }

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        measured = any(name.startswith(("validation/", "recall/")) for name in metrics)
        if self.log is not None and (measured or self._logs(step)):
            self.log.write(step, metrics)

    def _skip_or_stop(self, error: NonFinite) -> dict[str, float]:
        """Leave out a step that is not finite while the budget lasts, else stop all ranks."""
        self.skipped += 1
        budget = self.config.training.nonfinite_budget
        line = str(error)
        if self.world.is_first:
            line = write_nonfinite(self.loader, error, Path(self.config.run_dir))
        if self.skipped > budget:
            self.writer.finish()  # a save that is under way is worth keeping
            raise InputError(line)
        self.print_rank_0(
            f"{line} (left out, {self.skipped} of training.nonfinite_budget={budget})"
        )
        return {"skipped": 1.0}

    def _started(self) -> None:
        self.clock.end("first step")
        self.print_rank_0(self.clock.line())
        if self.log is not None:
            self.log.note(self.clock.metrics())

    def _watch(self, step: int, metrics: dict[str, float]) -> None:
        """Report a loss spike with the documents of its batch."""
        if self.world.is_first:
            line = self.spikes.seen(step, metrics, self.loader, Path(self.config.run_dir))
            if line is not None:
                self.print_rank_0(line)
