"""Would FP8 do? How far 8-bit linear layers move d = short - long and the weights made of it.

A measurement of a model that is there: nothing is trained in FP8, and no recipe asks for it. The
products of attention's and the MLP's linear layers are taken in float8_e4m3fn by
``torch._scaled_mm``, on a GPU by its FP8 units, on a CPU slowly; embedding, norms, attention and
head stay in bf16, as under TransformerEngine's recipes. Scales are those of the very tensor (its
"current scaling"); delayed ones, from earlier tensors, fit less well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lctw_megatron.benchmarks.large_model import LARGE
from lctw_megatron.benchmarks.measure import measure_in_turn
from lctw_megatron.benchmarks.results import Results
from lctw_megatron.benchmarks.scoring_gpu import WINDOW, random_windows
from lctw_megatron.benchmarks.steps import draw_weights
from lctw_megatron.config.model_sizes import forward_tokens
from lctw_megatron.config.schema import LayoutConfig, ModelConfig
from lctw_megatron.data.batch import IGNORE
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import find_checkpoint, load_weights, read_manifest
from lctw_megatron.model.spec import DTYPES
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.platform.world import initialize
from lctw_megatron.weighting import compute_weights, parse_weighting

FP8 = torch.float8_e4m3fn
SCALES = {"FP8, a scale a tensor": False, "FP8, a scale a row": True}
"""Rows: of the input the tokens, of the weight the outputs."""

Losses = tuple[Tensor, Tensor]
"""long_loss, short_loss: float32 [sequences, targets] on the host, nats."""


def quantise(values: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """values [rows, width] -> codes in FP8 and float32 scales ([rows, 1], or one number): values
    are about codes * scales, and the largest of a scale is FP8's largest."""
    values = values.float()
    largest = values.abs().amax(1, keepdim=True) if by_row else values.abs().max()
    scales = largest.clamp(min=1e-12) / torch.finfo(FP8).max
    return (values / scales).to(FP8), scales


@contextmanager
def fp8_linears(chunks: list[Any], by_row: bool) -> Iterator[None]:
    """Meanwhile the linear layers of ``chunks``, megatron-core's own on one rank, multiply in FP8.
    Without gradients."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    kinds = ColumnParallelLinear, RowParallelLinear
    linears: list[Any] = [
        module
        for chunk in chunks
        for module in chunk.decoder.modules()
        if isinstance(module, kinds)
    ]
    assert linears, "the layers are not megatron-core's own"
    for linear in linears:
        codes, scales = quantise(linear.weight.detach(), by_row)
        linear.forward = partial(_forward, linear, codes.t(), scales.t())
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward  # that of the class is seen again


def _forward(linear: Any, codes: Tensor, scales: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a parallel linear layer returns: the product, and the bias if another adds it."""
    rows, row_scales = quantise(x.flatten(0, -2), by_row=scales.dim() > 0)
    product = torch._scaled_mm(rows, codes, row_scales, scales, out_dtype=x.dtype)
    product = product.view(*x.shape[:-1], -1)
    if linear.bias is None or linear.skip_bias_add:
        return product, linear.bias
    return product + linear.bias, None


def moves(before: Losses, after: Losses) -> dict[str, float]:
    """How far d, the long log-probabilities and the weights are moved, the same targets each."""
    row: dict[str, float] = {}
    pairs = {
        "d": tuple(short - long for long, short in (before, after)),
        "log p": (-before[0], -after[0]),
    }
    for name, interpolation in (("dense", 0.0), ("dense 0.75", 0.75)):
        weighting = parse_weighting({"scheme": "dense", "interpolation": interpolation})
        pairs[name] = tuple(compute_weights(weighting, *losses) for losses in (before, after))
    for name, (old, new) in pairs.items():
        change = (new - old).abs()
        row |= {f"{name}, largest": float(change.max()), f"{name}, mean": float(change.mean())}
        row[f"{name}, correlation"] = float(torch.stack([old, new]).flatten(1).corrcoef()[0, 1])
    weighting = parse_weighting({"scheme": "sparse", "keep_fraction": 0.2})
    old, new = (compute_weights(weighting, *losses) > 0 for losses in (before, after))
    row["sparse, share of the kept that change"] = float((old & ~new).sum() / old.sum())
    row["mean loss"] = float((after[0] - before[0]).mean())
    return row


def fp8_benchmark(
    checkpoint: Path, data: str, output: Path, length: int, window: int, sequences: int
) -> int:
    """Losses of sequences of ``length`` tokens, long and in windows, in float32, bf16 and FP8, of
    the same weights; print how far each moves the last, and write it to ``output``."""
    if not window < length:
        raise InputError(
            f"--window {window}: scores nothing of sequences of {length} tokens; give a smaller "
            "one, or a larger --sequence-length"
        )
    folder, dataset = find_checkpoint(checkpoint), TokenDataset(data)
    model = read_manifest(folder).model.model_copy(update={"attention": "sdpa"})
    dataset.check_fits(model.vocab_size or 0, str(folder))
    tokens = text_of(dataset, length, sequences)
    results = Results(output)
    results["machine"] = capabilities().line()
    found = {}
    for precision in ("fp32", "bf16"):
        chunks = build(model, length, precision)
        load_weights(chunks, folder)
        found[precision] = both_losses(chunks, tokens, window)
    long_loss, short_loss = found["fp32"]
    results["float32"] = {
        "targets": long_loss.numel(), "mean long loss": float(long_loss.mean()),
        "mean short loss": float(short_loss.mean()),
        "mean |d|": float((short_loss - long_loss).abs().mean()),
    }  # fmt: skip
    results["bf16 beside float32"] = moves(found["fp32"], found["bf16"])
    for name, by_row in SCALES.items():
        with fp8_linears(chunks, by_row):
            losses = both_losses(chunks, tokens, window)
        results[f"{name}, beside bf16"] = moves(found["bf16"], losses)
    return 0


def text_of(dataset: TokenDataset, length: int, sequences: int) -> Tensor:
    """int64 [sequences, length + 1] of the data's documents: the first of each, then the second."""
    starts = [
        (start, document)
        for document, size in enumerate(dataset.lengths.tolist())
        for start in range(0, size - length, length)
    ]
    if not starts:
        raise InputError(
            f"{dataset.prefix}: its longest document has {dataset.lengths.max()} tokens, one more "
            f"than --sequence-length {length} are needed; give a smaller length or longer texts"
        )
    return torch.stack([
        torch.from_numpy(dataset.get(document, start, length + 1).astype("int64"))
        for start, document in sorted(starts)[:sequences]
    ])  # fmt: skip


def both_losses(chunks: list[Any], tokens: Tensor, window: int) -> Losses:
    """Of the targets that lie beyond the first window, by self-scoring's windows."""
    from megatron.core import parallel_state

    from lctw_megatron.scoring.forward import window_losses
    from lctw_megatron.scoring.self_scoring import SelfScorer

    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    batch = {"host_tokens": inputs, "host_labels": labels}
    group = parallel_state.get_context_parallel_group()
    SelfScorer(chunks, window, window * 3 // 4, inputs.shape[1], None, group).fill([batch])
    beyond = batch["short_loss"].isfinite().cpu()
    long_loss = window_losses(chunks, inputs, labels.where(beyond, IGNORE), inputs.shape[1])
    assert long_loss is not None
    return tuple(
        loss.cpu()[beyond].view(len(tokens), -1) for loss in (long_loss, batch["short_loss"])
    )  # type: ignore


def time_fp8(results: dict[str, Any]) -> None:
    """Windows of a 1B scorer with FP8 linear layers over bf16; quantising is kernels of its own."""
    from lctw_megatron.scoring.forward import window_losses

    model = ModelConfig.model_validate(LARGE["model"] | {"attention": "sdpa"})
    chunks = build(model, WINDOW, "bf16")
    draw_weights(chunks, model)
    tokens, labels = random_windows(model.vocab_size or 0, 16, torch.device("cuda"))

    def plain() -> None:
        window_losses(chunks, tokens, labels, forward_tokens(model, "cuda"))

    def quantised(by_row: bool) -> None:
        with fp8_linears(chunks, by_row):
            plain()

    functions: list[Callable[[], object]] = [
        plain,
        *(partial(quantised, by_row) for by_row in SCALES.values()),
    ]
    bf16, *costs = measure_in_turn(functions, torch.device("cuda"), 3)
    for name, cost in zip(SCALES, costs, strict=True):
        results[f"scoring 1B, {name}"] = {"time_ratio": cost.seconds / bf16.seconds}


def build(model: ModelConfig, length: int, precision: str) -> list[Any]:
    """A scorer with weights still to be set."""
    from lctw_megatron.model.gpt import build_model

    world = initialize(LayoutConfig(), seed=1)
    chunks = build_model(
        model, LayoutConfig(), max_sequence_length=length, dtype=DTYPES[precision],
        device=world.device, seed=None, packed=False,
    )  # fmt: skip
    for chunk in chunks:
        chunk.eval()
    return chunks
