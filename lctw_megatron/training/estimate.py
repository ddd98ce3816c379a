"""How much memory a rank needs, before any GPU is asked for.

Parameters, gradients and optimizer state are counted, not estimated: megatron-core keeps bf16 (or
fp32) weights, float32 gradients, and float32 master weights and Adam moments sharded over the
DP x CP ranks; those of experts over the TP x CP x DP / EP ranks that hold the same experts.

Activations follow Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models" (section 4 and appendix B), with what changed since:

- flash attention keeps its inputs, its output and one float32 per row and head, not the scores;
- RMSNorm, SwiGLU, rotary embedding and grouped-query attention have other widths than the GPT of
  the paper, and dropout is only where the model has it (then 2 h bytes of masks, / t as norms);
- CP divides the tokens of a rank; torch's attention gathers the keys and values of the whole
  sequence and keeps them, TransformerEngine's passes them round and does not.

Per token and layer that is, in elements, with h hidden, q and k the widths of all query and of all
key heads, d of one head, f the feed-forward width and t tensor-parallel ranks:

    inputs and outputs of two norms     4 h           (/ t under sequence parallelism)
    output of the qkv projection        q + 2 k   / t (the values are a view of it)
    rotated queries and keys            q + k     / t
    attention output                    q         / t
    gate, up and their product          3 f       / t
    cosines and sines, for q and for k  4 d

With experts, k of a token, of width x, the last but one is, if they are chosen evenly (the fullest
rank keeps more: `router/largest_load` of the metrics)

    tokens as they go to experts        k h           / t (sequence parallelism splits them)
    gate, up and their product          3 k x         / t
    what comes back of them             k h           / t

and where torch's attention gathers, q + CP x 2 k instead of the second and third line. Phi has one
norm (2 h), what GELU takes and gives (2 f / t), and of d what positions turn. On a CPU SwiGLU and
RMSNorm are not fused and keep 2 f + 2 h more, and masks are float32.

Not counted: the CUDA context, communication buffers, fragmentation and the working memory of single
kernels. Leave a tenth of the GPU free.
"""

from dataclasses import dataclass
from typing import Literal

from lctw_megatron.config.layout_rules import check_layout, loss_block_rows, padded_vocabulary
from lctw_megatron.config.model_sizes import (
    active_parameters,
    expert_width,
    layer_sizes,
    norm_size,
    parameters,
    rotary_width,
)
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.model import spec
from lctw_megatron.platform.capabilities import capabilities
from lctw_megatron.training.flops import step_flops

GIB = 1024**3
PLANNED_GIB = 80.0
"""Memory of the GPU, an A100 or H100, that a plan is made for where there is none."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage at the peak of a step."""

    layers: int
    parameters: int
    """Number of parameters on the rank (not bytes), its experts among them."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a rank, for every pipeline stage."""

    stages: tuple[StageMemory, ...]

    @property
    def largest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)


def planned_device(
    run: RunConfig, gpu_gib: float | None = None
) -> tuple[Literal["cuda", "cpu"], float | None]:
    """What a plan of ``run`` is for, and the GiB of its GPUs, None: this machine's memory. A CPU in
    float32 on a machine without a GPU, unless one of ``gpu_gib`` was named; in bf16 GPUs of
    PLANNED_GIB there."""
    if gpu_gib is not None or capabilities().gpu:
        return "cuda", gpu_gib
    return ("cuda", PLANNED_GIB) if run.training.precision == "bf16" else ("cpu", None)


def estimate(run: RunConfig, world_size: int, device: str = "cuda") -> MemoryEstimate:
    """Memory of ``run``, its micro batch size chosen, on ``world_size`` ranks of type ``device``
    (cuda, cpu). Without ``model.vocab_size`` (it comes from the tokenizer) embedding, head and loss
    are left out. Raises InputError for a wrong layout."""
    sizes = check_layout(run, world_size)
    assert sizes.data is not None and sizes.micro_batches is not None
    layout, bf16 = run.layout, run.training.precision == "bf16"
    element = 2 if bf16 else 4
    sharded_over = sizes.data * layout.context
    stages = []
    for stage in range(layout.pipeline):
        dense, experts = stage_parameters(run, stage), expert_parameters(run)
        count = dense + experts
        # float32 weights are their own master copy.
        each = 12 if bf16 else 8
        optimizer = dense * each // sharded_over + experts * each // expert_copies(run, sizes.data)
        stages.append(
            StageMemory(
                layers=sizes.layers_per_chunk * sizes.chunks,
                parameters=count,
                weights=count * element,
                gradients=count * 4,
                optimizer=optimizer,
                activations=_activations(run, stage, sizes.micro_batches),
                loss=_loss(run, device) if stage == layout.pipeline - 1 else 0,
            )
        )
    return MemoryEstimate(tuple(stages))


def expert_parameters(run: RunConfig) -> int:
    """Parameters of the experts on a rank, the same on every stage."""
    layers = run.model.num_layers // run.layout.pipeline
    return layers * layer_sizes(run.model).experts // run.layout.expert


def expert_copies(run: RunConfig, data: int) -> int:
    """Ranks of a stage that hold the same experts, under ``data`` data-parallel ranks."""
    layout = run.layout
    return layout.tensor * layout.context * data // layout.expert


def stage_parameters(run: RunConfig, stage: int) -> int:
    """Parameters on a rank of pipeline stage ``stage`` without experts. A tied head on another
    stage is a copy."""
    model, layout = run.model, run.layout
    layer = layer_sizes(model)
    split = (layer.matrices + layer.biases) // layout.tensor
    whole = layer.norms + layer.output_biases + layer.router
    count = model.num_layers // layout.pipeline * (split + whole)
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last
    if first and last and model.tie_word_embeddings:
        tables = 1
    columns = padded_vocabulary(model.vocab_size or 0) // layout.tensor
    head_bias = columns if model.parallel_block else 0
    count += tables * columns * model.hidden_size
    return count + (norm_size(model) + head_bias if last else 0)


def chunks_in_flight(run: RunConfig, stage: int, micro_batches: int) -> int:
    """Most (micro batch, model chunk) pairs that a stage has run forward but not yet backward.

    1F1B: the warm-up of a stage and one more. Interleaved: Narayanan et al. 2021, section 2.2, as
    megatron-core's `get_pp_rank_microbatches` counts it.
    """
    pipeline, chunks = run.layout.pipeline, run.layout.virtual_pipeline or 1
    if chunks == 1:
        return min(pipeline - stage, micro_batches)
    warm_up = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline
    return min(warm_up + 1, micro_batches * chunks)


def layer_activations(run: RunConfig) -> int:
    """Bytes that one layer keeps for the backward pass of one micro batch, nothing recomputed."""
    model, layout = run.model, run.layout
    element = 2 if run.training.precision == "bf16" else 4
    layer = layer_sizes(model)
    q, k = layer.query, layer.key_value
    gathers = layout.context > 1 and not _has_engine_attention(run)
    if gathers and layout.recompute != "selective":  # which drops what core attention gathers
        attention = q + layout.context * 2 * k + q
    else:
        attention = (q + 2 * k) + (q + k) + q
    phi = model.parallel_block
    if layout.recompute == "mlp":
        mlp = 0
    elif model.num_moe_experts:
        mlp = model.moe_router_topk * (3 * expert_width(model) + 2 * model.hidden_size)
    else:
        mlp = (2 if phi else 3) * model.ffn_hidden_size
    split = (attention + mlp) // layout.tensor
    hidden = model.hidden_size // (layout.tensor if layout.sequence else 1)
    norms = (2 if phi else 4) * hidden
    masks = 2 * hidden if model.hidden_dropout else 0  # of one byte an element
    rotary = 4 * rotary_width(model)
    log_sum_exp = 4 * model.num_attention_heads // layout.tensor
    return _tokens(run) * (element * (norms + split + rotary) + masks + log_sum_exp)


def _has_engine_attention(run: RunConfig) -> bool:
    """Whether TransformerEngine's core attention runs. Asked for on a machine without it, it counts
    as being on the one that will train."""
    there = run.model.attention == "te" or capabilities().transformer_engine is not None
    layers = spec.takes_engine_layers(run.model, spec.DTYPES[run.training.precision], there)
    return layers and run.data.packing == "chunk"


def recompute_lines(run: RunConfig) -> list[str]:
    """A line if `layout.recompute` does nothing, for the log and the plan."""
    dtype, packed = spec.DTYPES[run.training.precision], run.data.packing == "pack"
    acting = spec.recomputes(run.layout, dtype, packed, not _has_engine_attention(run))
    if acting == run.layout.recompute:
        return []
    return [
        f"layout.recompute {run.layout.recompute}: left out, as attention keeps nothing here that "
        "it would free; mlp and full free memory"
    ]


def _tokens(run: RunConfig) -> int:
    """Tokens of one micro batch on one rank."""
    assert run.training.micro_batch_size, "micro_batch.py chooses it"
    return run.training.micro_batch_size * run.data.sequence_length // run.layout.context


def _activations(run: RunConfig, stage: int, micro_batches: int) -> int:
    model, layout = run.model, run.layout
    element = 2 if run.training.precision == "bf16" else 4
    hidden = _tokens(run) * model.hidden_size * element
    if layout.sequence:
        hidden //= layout.tensor
    layers = model.num_layers // (layout.pipeline * (layout.virtual_pipeline or 1))
    one_layer = layer_activations(run)
    in_flight = chunks_in_flight(run, stage, micro_batches)
    if layout.recompute == "full":  # every layer's input, and one layer while it is recomputed
        kept = in_flight * layers * hidden + one_layer
    else:
        kept = in_flight * layers * one_layer
    final_norm = 2 * hidden if stage == layout.pipeline - 1 else 0
    return kept + final_norm


def _loss(run: RunConfig, device: str) -> int:
    """The head and the loss: see model/cross_entropy.py."""
    model, layout = run.model, run.layout
    if not model.vocab_size:
        return 0
    element = 2 if run.training.precision == "bf16" else 4
    columns = padded_vocabulary(model.vocab_size) // layout.tensor
    tokens = _tokens(run)
    hidden = tokens * model.hidden_size * element
    rows = min(loss_block_rows(layout, model.vocab_size, device), tokens)
    block = rows * columns * (4 + element)  # float32 logits, and the softmax in the weights' dtype
    block += 2 * rows * model.hidden_size * element  # the rows themselves, and their gradient
    weight_gradient = columns * model.hidden_size * 4
    gathered = hidden if layout.sequence else 0
    return gathered + hidden + block + weight_gradient + 4 * tokens


def describe_layout(run: RunConfig, world_size: int | None = None, device: str = "cuda") -> str:
    """What ``--dry-run`` prints: ranks per group, work and memory of a rank on a ``device``.

    ``world_size`` None means one copy of the model, without data parallelism.
    """
    model, layout = run.model, run.layout
    sizes = check_layout(run, world_size or layout.fewest_ranks)
    assert sizes.world_size and sizes.data and sizes.micro_batches
    lines = [f"layout: {sizes.world_size} ranks" + ("" if world_size else " (the fewest possible)")]
    # megatron-core's order: neighbours share a tensor group, pipeline stages are farthest apart.
    groups = {
        "tensor": (layout.tensor, ", sequence parallel" if layout.sequence else ""),
        "context": (layout.context, f", {sizes.tokens_per_rank:,} tokens of a sequence on each"),
        "data": (sizes.data, ""),
        "pipeline": (
            layout.pipeline,
            f", {sizes.chunks} x {sizes.layers_per_chunk} layers on each",
        ),
    }
    step = 1
    for name, (count, note) in groups.items():
        lines.append(_group_line(name, count, note, step))
        step *= count
    if model.num_moe_experts:
        each = model.num_moe_experts // layout.expert
        lines.append(_group_line("expert", layout.expert, f", {each} experts on each", 1))
        every, active = parameters(model) / 1e9, active_parameters(model) / 1e9
        lines.append(f"parameters: {every:,.2f} B, of which a token uses {active:,.2f} B")
    training, length = run.training, run.data.sequence_length
    batch, micro_batch = training.global_batch_size, training.micro_batch_size
    lines.append(
        f"batch: {batch} sequences of {length:,} tokens = {batch * length:,} tokens a step, "
        f"{sizes.micro_batches} micro batches of {micro_batch} on each data-parallel rank"
    )
    work = step_flops(run)
    lines.append(
        f"work: {work / 1e12:,.4g} TFLOP a step, {work / 1e12 / sizes.world_size:,.4g} on each rank"
    )
    lines += _memory_table(estimate(run, sizes.world_size, device), device)
    lines += recompute_lines(run)
    if not run.model.vocab_size:
        lines.append("  without embedding, head and loss: the vocabulary is the tokenizer's")
    return "\n".join(lines) + "\n"


def _group_line(name: str, count: int, note: str, step: int) -> str:
    members = [str(rank * step) for rank in range(count)]
    shown = " ".join(members if count <= 8 else [*members[:4], "...", members[-1]])
    return f"  {name:9}{count:4} ranks{note}; rank 0's group: {shown}"


def _memory_table(memory: MemoryEstimate, device: str) -> list[str]:
    where = "GPU" if device == "cuda" else "CPU"
    lines = [f"memory of a {where} rank in GiB, estimated (counted: training/estimate.py):"]
    columns = ["weights", "gradients", "optimizer", "activations", "loss", "total"]
    lines.append("  stage  layers  parameters" + "".join(f"{name:>12}" for name in columns))
    for number, stage in enumerate(memory.stages):
        values = "".join(f"{getattr(stage, name) / GIB:12.2f}" for name in columns)
        lines.append(f"  {number:5}  {stage.layers:6}  {stage.parameters / 1e6:8.1f} M{values}")
    return lines
