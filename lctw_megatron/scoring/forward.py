"""Per-token losses of many short windows: what frozen and self-scoring have in common."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lctw_megatron.model.cross_entropy import IGNORE
from lctw_megatron.model.device_batch import live_rows
from lctw_megatron.model.gpt import without_context_parallel, without_dropout
from lctw_megatron.platform.host_copies import to_device


@torch.no_grad()
def window_losses(
    chunks: list[Any], tokens: Tensor, labels: Tensor, tokens_per_forward: int
) -> Tensor | None:
    """Losses of windows under the model, dropout off, no gradient.

    tokens, labels [windows, K] int64, on the host, labels IGNORE where nothing is to be scored (no
    LM-head work is done there). chunks: this rank's model chunks, wrapped for data parallelism or
    not. The windows are run without context parallelism, through megatron-core's pipeline schedule,
    in as few forwards as fit into ``tokens_per_forward`` each, of one shape (without a pipeline the
    last may have fewer windows). All ranks of one tensor and pipeline group pass the same windows.

    Returns [windows, K] float32 (float64 for a float64 model) on the last pipeline stage, None on
    the others.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    number, window = tokens.shape
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    device = next(chunks[0].parameters()).device
    if number == 0:
        return torch.zeros((0, window), device=device) if last_stage else None
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    batches, per_forward = divide(number, tokens_per_forward // window, _multiple(chunks))
    missing = batches * per_forward - number
    if missing and stages > 1:  # they exchange tensors of one shape
        tokens = torch.cat([tokens, tokens.new_zeros((missing, window))])
        labels = torch.cat([labels, labels.new_full((missing, window), IGNORE)])
    positions = torch.arange(window, device=device).expand(per_forward, -1)

    def batch_iterator() -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, tokens.shape[0], per_forward):
            part = slice(start, start + per_forward)
            streams = (tokens[part], labels[part], live_rows(labels[part]))
            yield tuple(to_device(stream, device) for stream in streams)

    def forward_step(iterator: Iterator[tuple[Tensor, ...]], model: Any) -> Any:
        inputs, targets, rows = next(iterator)
        places = positions[: len(inputs)]
        return model(inputs, places, None, labels=targets, live_rows=rows), hand_over

    plain = [getattr(chunk, "module", chunk) for chunk in chunks]
    context_ranks = plain[0].config.context_parallel_size
    with without_dropout(plain), without_context_parallel(plain):
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[batch_iterator() for _ in chunks],
            model=chunks,
            num_microbatches=batches,
            # The schedule divides by the context-parallel ranks, which share nothing here.
            seq_length=window * context_ranks,
            micro_batch_size=per_forward,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return torch.cat(losses)[:number] if last_stage else None


def forwards_of(chunks: list[Any], windows: int, width: int, tokens_per_forward: int) -> int:
    """How many forwards ``window_losses`` takes for so many windows of ``width`` tokens."""
    return divide(windows, tokens_per_forward // width, _multiple(chunks))[0]


def _multiple(chunks: list[Any]) -> int:
    """The interleaved schedule takes multiples of the stages."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1


def divide(windows: int, room: int, multiple: int) -> tuple[int, int]:
    """(forwards, windows of each) of equal forwards of at most ``room`` windows, at least 1: as few
    as hold all ``windows`` and are a multiple of ``multiple``, and then as small."""
    forwards = -(-windows // max(1, room))
    forwards = -(-forwards // multiple) * multiple
    return forwards, -(-windows // forwards)


def hand_over(output: Tensor, non_loss_data: bool = False) -> Tensor:
    """What megatron-core's schedules ask of a forward's output where there is no backward: it."""
    return output
