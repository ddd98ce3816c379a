"""The one schema of a run: what every field means, its default and its limits.

A *recipe* (``Recipe``) describes one experiment from corpus to report and may hold several training
runs that share their sections. ``RunConfig`` is one of those runs, fully resolved: it is what
training reads, what ``--dry-run`` prints and what is saved with every run and checkpoint.
``load.py`` says how recipe files are written and read.

Longer than 350 lines: a reader of recipes finds every field in one file.
"""

import math
from typing import Annotated, Any, Literal, get_args
from unicodedata import category

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from lctw_megatron.config.time_limit import limit_seconds
from lctw_megatron.config.written_path import WrittenPath

Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]
Bytes = Annotated[int, Field(gt=0, le=2**62)]
MOST_TOKENS = 2**24
"""Of one sequence."""
Width = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
"""Sizes of matrices, and tokens: products of two stay far below what torch and numpy count with."""
Fraction = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
MOST_DOCUMENT_BYTES = 1 << 28
"""Of one document, unless another limit is given: a broken file may be one line of terabytes."""

_OF_SEVERAL_LINES = {"note", "setup"}


def check_text(text: str, allowed: str = "") -> None:
    """ValueError if ``text`` holds a control character that is not ``allowed``, a line separator or
    half of a surrogate pair (which has no UTF-8)."""
    for character in text:
        if category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in allowed:
            raise ValueError(f"text without control characters (found {character!a})")


class Section(BaseModel):
    """Base of all sections: unknown fields are errors, values do not change after parsing."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_text_of_one_line(cls, value: Any, info: ValidationInfo) -> Any:
        """Names and paths become lines of batch scripts, where a line break would begin a command
        of its own, and C strings, which a NUL would end."""
        allowed = "\n\t" if info.field_name in _OF_SEVERAL_LINES else ""
        if "" in (value if isinstance(value, list) else [value]) and not allowed:
            raise ValueError("a text that is not empty")  # as of a shell variable that is not set
        texts = [*value, *value.values()] if isinstance(value, dict) else value
        for text in texts if isinstance(texts, list) else [texts]:
            if isinstance(text, str):
                check_text(text, allowed)
        return value


class PrepareConfig(Section):
    """From a corpus to a token dataset (``tools/preprocess.py``)."""

    inputs: Annotated[list[str], Field(min_length=1)]
    """Files, folders or globs: jsonl, txt, parquet; plain, .gz or .zst. `stdlib` is the installed
    Python standard library, modules joined per package."""
    output_prefix: WrittenPath
    """Where PREFIX.bin, .idx and .json are written."""
    tokenizer: str | None = None
    """A SentencePiece .model file or a Hugging Face tokenizer folder."""
    train_sentencepiece: Positive | None = None
    """Train a SentencePiece model with this vocabulary on the corpus instead."""
    validation_documents: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Hold out this many documents, evenly spaced, as PREFIX-validation (also as jsonl text)."""
    max_bytes: Bytes | None = None
    """Use no more than this many bytes of the corpus (whole documents)."""
    max_document_bytes: Annotated[int, Field(gt=0, le=2**31 - 2)] = MOST_DOCUMENT_BYTES
    """A longer document (of jsonl: a longer line) counts as broken."""
    text_field: str = "text"
    """The field of a jsonl line or the column of a parquet file that holds the text."""
    skip_bad: bool = False
    """Count broken lines instead of stopping at the first."""
    workers: Positive = 2
    """Processes that tokenise."""


class Corpus(Section):
    """One token dataset of a blend."""

    prefix: str
    weight: Annotated[float, Field(gt=0, le=1e12)] = 1.0


class DataConfig(Section):
    """What a run trains on."""

    train: list[Corpus]
    """Token datasets, blended by weight."""
    validation: list[Corpus] = []
    """Token datasets whose plain loss is measured every `training.eval_interval` steps."""
    sequence_length: Width = 1024
    """S: input tokens of one sequence."""
    packing: Literal["chunk", "pack"] = "chunk"
    """chunk: S-token chunks of one document. pack: pieces of several documents, best fit, with a
    document mask between them."""
    tails: Literal["drop", "keep"] = "keep"
    """What happens in chunk mode to the last, shorter chunk of a document: dropped (its targets are
    never trained on) or padded (its padding is computed for nothing). The loader prints both
    prices."""
    scores: str = "short_loss"
    """Name of the sidecar, PREFIX.<scores>.bin, that frozen weighting reads."""
    index_cache: str | None = None
    """Folder for the packed sequence indices; default: `index_cache` beside each dataset."""
    shuffle: bool = True
    """Shuffle sequences anew every epoch, from the run's seed."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _prefixes_are_corpora(cls, value: Any) -> Any:
        """A prefix, or a list of prefixes, is short for corpora of equal weight."""
        items = [value] if isinstance(value, str | dict | Corpus) else value
        if not isinstance(items, list):
            return items
        return [{"prefix": item} if isinstance(item, str) else item for item in items]


class RopeScaling(Section):
    """`rope_scaling` of Hugging Face configs, names and meaning as there: rotary positions
    stretched for a longer context. Which fields a type has: config/rope.py."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"] = "llama3"
    factor: Annotated[float, Field(ge=1, le=1e6)]
    """How many times longer."""
    original_max_position_embeddings: Positive | None = None
    """dynamic, yarn, llama3: tokens of the context before stretching."""
    low_freq_factor: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """llama3: frequencies with fewer turns than this within the original context are divided."""
    high_freq_factor: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    """llama3: with more, kept."""
    attention_factor: Annotated[float, Field(gt=0, le=1e3)] | None = None
    """yarn: queries and keys are multiplied with it; default: 0.1 ln(factor) + 1."""
    beta_fast: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """yarn: frequencies with more turns than this within the original context are kept; default:
    32."""
    beta_slow: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """yarn: with fewer, divided; default: 1."""
    mscale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """yarn, with mscale_all_dim (DeepSeek): attention_factor is (0.1 mscale ln(factor) + 1) /
    (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e6)] | None = None
    truncate: bool | None = None
    """yarn: the bounds between kept and divided are rounded to whole frequencies; default: true."""

    @model_serializer(mode="wrap")
    def _as_given(self, whole: Any) -> dict[str, Any]:
        """Without nulls: transformers reads a null `truncate` as false, and a recipe refuses it."""
        return {name: value for name, value in whole(self).items() if value is not None}


class ModelConfig(Section):
    """A decoder-only transformer: RoPE, RMSNorm, SwiGLU, grouped-query attention, dense or with a
    mixture of experts in every layer; or Phi's."""

    architecture: Literal["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi"] = (
        "llama"
    )
    """Which Hugging Face architecture this exports to."""
    num_layers: Annotated[int, Field(gt=0, le=2**16)]
    hidden_size: Width
    ffn_hidden_size: Width
    num_attention_heads: Width
    num_query_groups: Width | None = None
    """Key/value heads; default: as many as attention heads."""
    kv_channels: Annotated[int, Field(gt=0, le=2**16, multiple_of=2)] | None = None
    """Width of one head; default: hidden_size / num_attention_heads."""
    vocab_size: Annotated[int, Field(gt=0, le=2**27)] | None = None
    """True vocabulary (padding to a multiple of 128 is added inside); default: the tokenizer's."""
    max_position_embeddings: Positive | None = None
    """Written to the exported config; default: the sequence length trained with, yarn's factor x
    its original maximum if that is more; under dynamic always its original maximum."""
    rope_theta: Annotated[float, Field(gt=0, le=1e30)] = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """phi: the share of each head that positions turn; the rest stays as it is."""
    layernorm_epsilon: Annotated[float, Field(ge=0, le=1)] = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2, Phi)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head (Qwen3)."""
    num_moe_experts: Annotated[int, Field(gt=1, le=2**16)] | None = None
    """Experts of every layer, in the place of its one MLP; every token goes to `moe_router_topk` of
    them, however many others go there (nothing is dropped). Default: none, a dense model."""
    moe_ffn_hidden_size: Width | None = None
    """Width of one expert; default: ffn_hidden_size, which is no width of any other part then."""
    moe_router_topk: Positive = 2
    """Experts of a token."""
    norm_topk_prob: bool = True
    """The probabilities of a token's experts are scaled to sum 1; else each counts with what it is
    among all experts (Megatron's `moe_router_pre_softmax`)."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Times the load-balancing loss of every layer, which is added to the objective as it is, never
    weighted by token (model/router.py)."""
    init_method_std: Annotated[float, Field(ge=0, le=1e38)] = 0.02
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the embeddings; default: hidden_dropout."""
    attention: Literal["auto", "te", "sdpa"] = "auto"
    """te: TransformerEngine's layers and attention. sdpa: torch's. auto: te where a GPU has it."""

    @property
    def parallel_block(self) -> bool:
        """Phi's layers: attention and MLP side by side on one LayerNorm, GELU, and a bias on every
        projection, the head's too."""
        return self.architecture == "phi"


class LayoutConfig(Section):
    """The parallel sizes. Data parallelism is what is left of the world size."""

    tensor: Positive = 1
    """TP: each layer's matrices are split over this many ranks."""
    sequence: bool = False
    """SP: norms and residuals are split over the TP ranks too. Needs tensor > 1."""
    pipeline: Positive = 1
    """PP: stages of consecutive layers."""
    virtual_pipeline: Annotated[int, Field(gt=1)] | None = None
    """VPP: model chunks on each pipeline rank (interleaved schedule). Needs pipeline > 1."""
    context: Positive = 1
    """CP: every sequence is split over this many ranks, zigzag."""
    expert: Positive = 1
    """EP: each layer's experts are shared out, whole, to this many of the tensor x context x data
    ranks of a pipeline stage. Must divide those and the experts."""
    recompute: Literal["none", "selective", "mlp", "full"] = "none"
    """Activations recomputed in the backward pass: none; selective, the core attention (with
    context > 1 or packing this drops gathered and copied keys and values; left out, and said so,
    where there are none); the MLP, which at long context is most of the memory and little of the
    time; or whole layers."""
    loss_block_rows: Positive | None = None
    """Rows of logits that exist at a time in the loss; default: as many as fit into 2 GiB on a GPU,
    64 MiB on a CPU (layout_rules.loss_block_rows)."""

    @property
    def model_ranks(self) -> int:
        """Ranks that work on the same sequences: those that hold one model between them, but for
        experts, which data-parallel ranks may share."""
        return self.tensor * self.pipeline * self.context

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks, of which all others are multiples."""
        return math.lcm(self.tensor * self.context, self.expert) * self.pipeline


class WeightingConfig(Section):
    """Scores (a scheme and where the short losses come from) and post-processing: weighting/."""

    scheme: str = "uniform"
    """uniform, dense, sparse, longce, longppl, ppmi, npmi, rho, eslm, position or custom."""
    mode: Literal["frozen", "self"] = "frozen"
    """frozen: short losses from the sidecar. self: the training model scores its own windows."""
    interpolation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lambda: the final weight is lambda + (1 - lambda) * weight."""
    keep_fraction: Fraction | None = None
    """Kappa: the share of the targets of a sequence that sparse, ppmi, npmi, rho and eslm keep."""
    max_weight: Annotated[float, Field(ge=1, le=1e30)] | None = None
    """Gamma: longce's upper bound, at least the 1 of a target that long context leaves alone."""
    normalise: Literal["none", "sequence"] | None = None
    """longce and custom: none, the default, takes their weights as they are; sequence scales those
    of every sequence to mean 1, which the other schemes always do."""
    min_difference: float | None = None
    """Alpha: a key token of longppl has a short less long loss above this, in nats; default: 2."""
    min_log_probability: Annotated[float, Field(lt=0)] | None = None
    """Beta: and a log-probability above this with long context; default: -2. None is above 0."""
    shift: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """s: ppmi and npmi subtract log s."""
    unscored: Literal["zero", "one"] = "zero"
    """Targets without a short loss: zero = score 0, never kept before a scored one (lambda under
    dense; 1 under longce); one = weight 1, outside the normalisation."""
    function: str | None = None
    """custom: import path `package.module:function`."""
    window: Positive | None = None
    """self: K, the tokens the short context sees. frozen: checked against the sidecar if given."""
    stride: Positive | None = None
    """self: distance between windows. frozen: checked against the sidecar if given."""
    tokens_per_forward: Positive = 16384
    """self: the scoring forward takes as many windows at once as fit into this many tokens."""


RecallTask = Literal[
    "one_key",
    "multi_key",
    "multi_value",
    "multi_query",
    "variables",
    "json",
    "frequent_words",
    "code",
]
"""What is hidden in a long text and asked for: evaluation/recall_tasks.py."""


class RecallConfig(Section):
    """Recall of facts hidden in long texts, measured during training and written into its metrics
    (`recall/TASK/LENGTH/nats` an answer token, and the share `right`). Costs forward passes only:
    tasks x lengths x samples sequences each time."""

    lengths: Annotated[list[Width], Field(min_length=1)]
    """Tokens of the samples."""
    tasks: Annotated[list[RecallTask], Field(min_length=1)] = ["one_key"]
    samples: Positive = 20
    """Of each task and length, at depths that take turns."""
    every: Positive
    """Steps between two measurements."""


class TrainingConfig(Section):
    """The loop, the optimizer and the checkpoints."""

    steps: Positive
    global_batch_size: Positive = 8
    """Sequences of one optimizer step, over all data-parallel ranks."""
    micro_batch_size: Positive | None = None
    """Sequences of one forward pass of one data-parallel rank; default: as many as fit a rank's
    memory and divide what it has of the global batch (training/micro_batch.py)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    lr: Annotated[float, Field(gt=0, le=1e3)] = 2e-5
    min_lr: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 20
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_eps: Annotated[float, Field(gt=0, le=1e3)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    clip_grad: Annotated[float, Field(ge=0, le=1e30)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    log_interval: Positive = 1
    eval_interval: Positive | None = None
    eval_sequences: Positive = 32
    """Sequences of the validation data measured each time."""
    recall: RecallConfig | None = None
    save_interval: Positive | None = None
    """Steps between checkpoints; the last step is always saved."""
    async_save: bool = False
    """Write checkpoints in a background process while training goes on."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of this are kept for ever."""
    near_distance: Positive | None = None
    """The metrics call a target near if its token last occurred at most this many tokens before,
    far if farther back, first_seen if never; default: the weighting's window, else S / 4."""
    tensorboard: bool = True
    trackers: list[Literal["wandb", "mlflow"]] = []
    """Weights & Biases and MLflow, which take the same metrics, each by its own library and
    environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, ...); a resumed run goes on there."""
    nonfinite_budget: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Steps with a non-finite loss or gradient that are skipped before training stops."""
    deterministic: bool = False
    """On a GPU: only kernels that add up in one order, so that a repeated or resumed run is equal
    bit for bit, at the price of a slower backward of attention. A CPU always does."""
    distributed_timeout_minutes: Annotated[int, Field(gt=0, le=24 * 24 * 60)] = 30
    """A collective that hangs longer ends the job; 24 days are 2^31 milliseconds."""
    hang_minutes: Annotated[float, Field(ge=0, le=24 * 24 * 60)] | None = 20.0
    """A step, an evaluation or a save that takes longer ends the job, with every rank's Python
    stack in its log, and batch scripts start it again. 0 or null: never. Less than
    `distributed_timeout_minutes`, or that one ends it first, without the stacks."""


class MegatronConfig(Section):
    """What training takes of megatron-core: its model, and fields of its own configs, under its own
    names. What may be set, and why the rest may not: model/megatron_fields.py."""

    model: Literal["gpt", "hybrid"] = "gpt"
    """GPTModel or, with megatron-core 0.18 and newer, its successor HybridModel: the same losses,
    gradients and checkpoints."""
    transformer: dict[str, Any] = {}
    """Of TransformerConfig, e.g. `{gradient_accumulation_fusion: true}`."""
    ddp: dict[str, Any] = {}
    """Of DistributedDataParallelConfig, e.g. `{overlap_param_gather: true}`."""
    optimizer: dict[str, Any] = {}
    """Of OptimizerConfig, e.g. `{decoupled_weight_decay: false}`."""


class ScoringConfig(Section):
    """From a token dataset and a scorer to a sidecar (``tools/score.py``)."""

    scorer: str
    """A run of this recipe or a checkpoint folder."""
    window: Positive
    """K: tokens the short-context model sees."""
    stride: Positive
    """Distance between windows, at most K."""
    sequence_length: Positive | None = None
    """Windows restart at every multiple of this too; default: only at documents."""
    name: str = "short_loss"
    score_first_window: bool = False
    """Score the targets of the first window too, where both contexts are the same."""
    tokens_per_forward: Positive | None = None
    """Of one forward; default: as begun, else 16,384, on a GPU up to 65,536 for a small scorer."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of weights and products, losses are float32; default: as begun, else bf16 on a GPU, fp32 on a
    CPU."""
    tensor: Positive = 1
    """Tensor-parallel ranks that share one scorer."""
    pipeline: Positive = 1
    """Pipeline stages that share one scorer."""
    shards: Positive = 1
    """Independent jobs the work is split into on a cluster."""


class RecallProbes(Section):
    """Recall of facts hidden in long texts, after training (``evaluate_model.py recall``)."""

    lengths: Annotated[list[Width], Field(min_length=1)]
    """Tokens of the samples."""
    tasks: Annotated[list[RecallTask], Field(min_length=1)] = list(get_args(RecallTask))
    depths: Positive = 5
    """Places of the fact, evenly spaced from beginning to end."""
    samples: Positive = 20
    """Of each task, length and depth."""
    haystack: str | None = None
    """A text file or the prefix of a token dataset, better a held-out one, in which facts are
    hidden; default: repeated sentences, for code functions."""
    window: Positive | None = None
    """Tokens of the short context; default: the window of the run's weighting, else 1,024. Give
    one to compare runs whose weightings differ."""


class EvaluationConfig(Section):
    """Held-out probes of every final run (``tools/evaluate_model.py``), and their report."""

    data: str
    """Prefix of the held-out token dataset."""
    sequence_length: Positive | None = None
    """Default: the run's."""
    max_sequences: Positive = 32
    window: Positive | None = None
    """Tokens of the short context of LongPPL (5,120 in its paper) and of the gain from long
    context; default: neither is measured."""
    stride: Positive | None = None
    """Distance between short windows; default: a quarter of the window."""
    near: Positive | None = None
    """A target is near if its token last stood at most this many tokens back; default: the window,
    else a quarter of the sequence."""
    key_checkpoint: str | None = None
    """The run of this recipe, or the checkpoint folder, that picks LongPPL's key tokens for all
    runs; default: each run for itself."""
    note: str | None = None
    """What a reader of the report must know."""
    compare_with: list[str] = []
    """Folders of other recipes' finished runs that the report takes too; the first, and those that
    differ from it in the seed alone, are what it compares with. Default: the recipe's first run."""
    recall: RecallProbes | None = None
    verify_exports: bool = False
    """Compare every exported folder with its checkpoint: all tensors, and the logits of
    transformers in float32. Takes the memory of two such models.
    """


class ClusterConfig(Section):
    """Site settings of a SLURM cluster (fragments in configs/clusters/)."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # environment: {OMP_NUM_THREADS: 1}

    partition: str | None = None
    cpu_partition: str | None = None
    """Where stages that need no GPU go, without `constraint`; default: `partition`."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: Positive = 1
    gpus_per_node: Annotated[int, Field(ge=0, le=2**16)] = 8
    """0 trains on the CPU with gloo."""
    tasks_per_node: Positive | None = None
    """Ranks of one node; default: its GPUs."""
    cpus_per_task: Positive | None = None
    """CPU cores of each rank."""
    time_limit: str = "24:00:00"
    """As sbatch takes it: minutes, hours:minutes:seconds, days-hours, ..."""
    signal_seconds: Annotated[int, Field(gt=0, le=65535, validate_default=True)] = 300
    """SIGTERM reaches the ranks this long before the time limit."""
    modules: list[str] = []
    environment: dict[str, str] = {}
    """Exported in every job (NCCL variables, caches). $NAME, ${NAME} and ~ where a path begins are
    expanded in the job."""
    setup: list[str] = []
    """Shell lines run before the command, e.g. activating an environment; one that fails ends the
    job."""
    container: str | None = None
    """Put before the command, e.g. `apptainer exec --nv image.sif`."""
    srun: list[str] = []
    """Further options of srun, e.g. `--container-image=image.sqsh` (Pyxis)."""
    sbatch: list[str] = []
    """Further #SBATCH lines, without the `#SBATCH`."""

    @field_validator("signal_seconds")
    @classmethod
    def _is_within_the_time_limit(cls, seconds: int, info: ValidationInfo) -> int:
        limit = info.data.get("time_limit")
        if limit is not None and seconds >= limit_seconds(limit):
            raise ValueError(f"less than time_limit {limit}, or jobs must leave as they start")
        return seconds

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, limit: str) -> str:
        limit_seconds(limit)
        return limit

    @field_validator("sbatch")
    @classmethod
    def _are_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("-"):  # of `#SBATCH word` sbatch makes nothing, silently
                raise ValueError(f"options, each beginning with - ({option!r} does not)")
        return options

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not (name.isascii() and name.isidentifier()):  # or the shell ends every job
                raise ValueError(f"names of letters, digits and _ ({name!r} is none)")
        return environment


class RunConfig(Section):
    """One training run, fully resolved."""

    name: str
    run_dir: str
    """Checkpoints, metrics and the resolved config go here."""
    start: str | None = None
    """Weights to start from: a checkpoint folder of ours (imported or trained); default: random."""
    seed: Seed = 1234
    data: DataConfig
    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    weighting: WeightingConfig = WeightingConfig()
    training: TrainingConfig
    megatron: MegatronConfig = MegatronConfig()


class RunSections(Section):
    """What a run may set; beside `runs` in a recipe file, what all its runs share."""

    start: str | None = None
    """A run of the recipe, whose newest checkpoint is taken, or a checkpoint folder."""
    seed: Seed = 1234
    """Of the order of the data, and of random weights and dropout."""
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    """Instead of `seed`: the run is made once with each, as NAME-seed1, NAME-seed2, ..."""
    data: DataConfig | None = None
    model: ModelConfig | None = None
    """May be missing or partial in a run that starts from a checkpoint, which carries its own."""
    layout: LayoutConfig = LayoutConfig()
    weighting: WeightingConfig = WeightingConfig()
    training: TrainingConfig | None = None
    megatron: MegatronConfig = MegatronConfig()


class Experiment(Section):
    """What a recipe says once, for all its runs."""

    name: str
    output_dir: WrittenPath
    """Every run writes to OUTPUT_DIR/<run name>."""
    prepare: PrepareConfig | None = None
    scoring: ScoringConfig | None = None
    evaluation: EvaluationConfig | None = None
    export: bool = True
    """Whether the final runs, from which no other starts, become Hugging Face folders."""
    cluster: ClusterConfig | None = None


class RecipeFile(Experiment, RunSections):
    """One experiment, from corpus to report, as it is written; ``load.py`` has the short forms."""

    runs: dict[str, RunSections] = {}
    """Run name to what this run changes in the sections that all runs share. Without `runs` there
    is one run, `main`."""


class Recipe(Experiment):
    """A recipe as ``load_recipe`` returns it: shared sections merged into every run."""

    runs: dict[str, dict[str, Any]]
    """Run name to all its sections as plain values; ``resolve_run`` makes a RunConfig of one."""
