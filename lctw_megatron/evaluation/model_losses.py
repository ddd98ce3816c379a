"""A checkpoint and the losses it gives the targets of whole sequences, under any layout."""

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lctw_megatron.config.layout_rules import check_model, without_gradients
from lctw_megatron.config.model_sizes import forward_tokens
from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.data.batch import Sample
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.data.tokenizer_files import has_tokenizer
from lctw_megatron.data.tokenizers import Tokenizer, load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.held_out import check_tokens
from lctw_megatron.evaluation.sequence_losses import Batch, SequenceLosses
from lctw_megatron.evaluation.sequence_weights import live_targets
from lctw_megatron.model import spec
from lctw_megatron.model.checkpoint import (
    TOKENIZER,
    CheckpointManifest,
    agreed_checkpoint,
    load_weights,
)
from lctw_megatron.platform.world import initialize, join


def check_data(checkpoint: Path, manifest: CheckpointManifest, dataset: TokenDataset) -> None:
    """InputError if the model of ``checkpoint`` does not read ``dataset`` (``check_tokens``). To be
    asked before the model is loaded."""
    known, vocab_size = manifest.tokenizer or {}, manifest.model.vocab_size or 0
    check_tokens(dataset, known, vocab_size, str(checkpoint))


class ModelLosses(SequenceLosses):
    """The model of a checkpoint on this rank, dropout off, no gradients."""

    def __init__(
        self,
        checkpoint: str | Path,
        layout: LayoutConfig,
        sequence_length: int,
        tokens_per_forward: int | None = None,
    ) -> None:
        """checkpoint: as ``find_checkpoint`` takes it. sequence_length: the longest to come.

        tokens_per_forward: see ``SequenceLosses``; None chooses by the model. Raises InputError for
        a missing or damaged checkpoint and a layout that does not fit.
        """
        from lctw_megatron.model.gpt import build_model

        if layout.virtual_pipeline:
            raise InputError(
                "layout.virtual_pipeline: an evaluation gains nothing from it; leave it out"
            )
        join(layout)
        self.checkpoint, self.manifest = agreed_checkpoint(checkpoint)
        model = self.manifest.model
        check_model(model, layout)
        layout = without_gradients(layout, model)
        world = initialize(layout, seed=0)
        chunks = build_model(
            model,
            layout,
            max_sequence_length=sequence_length,
            dtype=spec.DTYPES.get(self.manifest.dtype, torch.float32),
            device=world.device,
            seed=None,
        )
        load_weights(chunks, self.checkpoint)
        for chunk in chunks:
            chunk.eval()
        tokens = tokens_per_forward or forward_tokens(model, world.device.type)
        super().__init__(chunks, layout, world, tokens)

    def losses(self, samples: Sequence[Sample]) -> np.ndarray:
        """Losses of the targets of ``samples``: float32 [n, S], nats; NaN where there is no target.

        A collective call. InputError if the model's loss of a target is not finite.
        """
        (losses,) = self.gather(samples, self.forward)
        wrong = ~np.isfinite(losses) & live_targets(samples)
        if wrong.any():
            row, target = np.argwhere(wrong)[0]
            raise InputError(
                f"{self.checkpoint}: its loss of target {target} of a sequence from document "
                f"{samples[row].documents[0]} is {losses[row, target]}; evaluate an earlier "
                "checkpoint"
            )
        return losses

    def short_losses(
        self, samples: Sequence[Sample], window: int, stride: int, bos_id: int | None
    ) -> np.ndarray:
        """Losses under the last ``window`` tokens only: float32 [n, S], NaN where not scored.

        Windows and what they score are those of self-scoring in training: the first
        ``window - 1`` targets of a piece have none. A collective call.
        """
        from megatron.core import parallel_state

        from lctw_megatron.scoring.self_scoring import SelfScorer

        scorer = SelfScorer(
            self.chunks,
            window,
            stride,
            self.tokens_per_forward,
            bos_id,
            parallel_state.get_context_parallel_group(),
        )

        def compute(batches: list[Batch]) -> list[Tensor] | None:
            scorer.fill(batches)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            return [batch["short_loss"][None] for batch in batches] if last else None

        return self.gather(samples, compute)[0]

    def free(self) -> None:
        """Give the memory back, for another model."""
        self.chunks.clear()
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


def tokenizer_of(checkpoint: Path, manifest: CheckpointManifest) -> Tokenizer:
    """The checkpoint's own, else the one its data was made with. InputError, also if that is
    another by now."""
    if has_tokenizer(checkpoint / TOKENIZER):
        return load_tokenizer(checkpoint / TOKENIZER)
    if manifest.tokenizer is None:
        raise InputError(
            f"{checkpoint}: has no tokenizer; import it again from a folder that has one"
        )
    tokenizer = load_tokenizer(manifest.tokenizer["path"])
    found, expected = tokenizer.identity.digest, manifest.tokenizer["digest"]
    if found != expected:
        raise InputError(
            f"tokenizer {tokenizer.identity.path}: its digest is {found}, but {checkpoint}, which "
            f"has no tokenizer files of its own, was trained with {expected}; restore its files"
        )
    return tokenizer
