"""Ten steps of the plug-in's two examples in the loops of megatron.training and Megatron-Bridge, on
CPU ranks."""

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SEQUENCE, VOCABULARY, STEPS = 64, 256, 10  # a vocabulary that Megatron pads by nothing
SEED, SPLIT = 1234, "90,10,0"

ARGUMENTS = f"""
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm
    --norm-epsilon 1e-5 --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
    --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --vocab-size {VOCABULARY}
    --tokenizer-type NullTokenizer --split {SPLIT} --seed {SEED} --num-workers 0
    --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --eval-iters 1
    --eval-interval 5 --lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --adam-beta2 0.95
    --clip-grad 1.0 --token-weighting dense --calculate-per-token-loss
    --transformer-impl local --distributed-backend gloo --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-rope-fusion --log-interval 1
""".split()

Outcome = tuple[list[dict[str, float]], dict[str, Any]]
"""Each step's reported losses on this rank, and the weights after the last (arrays, by name)."""


def token_losses(model: Any) -> Any:
    """float32 array [2, SEQUENCE]: what a GPTModel loses on a text of random tokens."""
    text = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))
    positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    with torch.no_grad():
        return model.eval()(text[:, :-1], positions, None, labels=text[:, 1:]).numpy().copy()


def by_megatron_lm(
    prefix: str, folder: str, weights: dict[str, Any], *more: str
) -> tuple[Outcome, Any]:
    """The example pretrain_gpt.py with ``more`` arguments, beginning with these weights; beside its
    outcome the ``token_losses`` of the model that it ends with."""
    import megatron.core.datasets.utils as dataset_helpers
    from megatron.training import training

    from lctw_megatron.plugin import pretrain_gpt
    from tests.plugin.cuda_stand_in import stand_in

    stand_in("megatron.training", "megatron.core.timers")
    data = ["--data-path", prefix, "--data-cache-path", str(Path(folder) / "cache")]
    with (
        # Its helpers are in the wheel, compiled; the Makefile that it wants to run is not.
        mock.patch.object(dataset_helpers, "compile_helpers", lambda: None),
        mock.patch.object(sys, "argv", ["pretrain_gpt.py", *ARGUMENTS, *data, *more]),
        recorded(training, weights) as (outcome, models),
    ):
        pretrain_gpt.main()
        return outcome(), token_losses(models[0])


def by_megatron_bridge(prefix: str, folder: str, weights: dict[str, Any]) -> Outcome:
    """The example pretrain_bridge.py, beginning with these weights."""
    from lctw_megatron.platform.cpu import patch_megatron

    patch_megatron()  # megatron-core knows now what is not there
    sys.meta_path.insert(0, Absent("transformer_engine", "modelopt", "nvidia_resiliency_ext"))
    others = ("megatron.energon", "wandb", "mlflow", "comet_ml", "diffusers", "timm", "open_clip")
    sys.meta_path.append(Absent(*others))  # only where they are not installed
    from megatron.bridge.training import eval as evaluation
    from megatron.bridge.training import initialize, train

    from lctw_megatron.plugin import pretrain_bridge
    from tests.plugin.cuda_stand_in import stand_in

    stand_in("megatron.bridge", "megatron.training", "megatron.core.timers")
    # It asks modelopt, which is not there, for it.
    shapes = "get_tensor_shapes_adjust_fn_for_distillation"
    recipe = ["--recipe", "tests.plugin.pretrain_runs:bridge_recipe", "--data-path", prefix]
    with (
        mock.patch.object(initialize, "compile_helpers", lambda: None),
        mock.patch.object(train, shapes, lambda *args, **kwargs: None),
        mock.patch.object(evaluation, shapes, lambda *args, **kwargs: None),
        mock.patch.object(sys, "argv", ["pretrain_bridge.py", *recipe]),
        recorded(train, weights) as (outcome, _),
    ):
        pretrain_bridge.main()
        return outcome()


def bridge_recipe() -> Any:
    """A ConfigContainer of Megatron-Bridge that says what ARGUMENTS say."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model = GPTModelProvider(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
        num_query_groups=2, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        normalization="RMSNorm", add_bias_linear=False, share_embeddings_and_output_weights=False,
        position_embedding_type="rope", attention_dropout=0.0, hidden_dropout=0.0,
        seq_length=SEQUENCE, vocab_size=VOCABULARY, make_vocab_size_divisible_by=128,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
        cross_entropy_loss_fusion=False, bf16=False, params_dtype=torch.float32,
    )  # fmt: skip
    return config.ConfigContainer(
        model=model,
        train=config.TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=2),
        validation=config.ValidationConfig(eval_interval=5, eval_iters=1),
        optimizer=config.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-3, weight_decay=0.1, adam_beta2=0.95,
            clip_grad=1.0, use_distributed_optimizer=True, bf16=False,
        ),
        scheduler=config.SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=0, start_weight_decay=0.1,
            end_weight_decay=0.1, weight_decay_incr_style="constant",
        ),
        ddp=config.DistributedDataParallelConfig(
            use_distributed_optimizer=True, average_in_collective=True
        ),
        dataset=config.GPTDatasetConfig(
            seq_length=SEQUENCE, random_seed=SEED, split=SPLIT, reset_attention_mask=False,
            reset_position_ids=False, eod_mask_loss=False, num_workers=0,
            persistent_workers=False, dataloader_type="single",
        ),
        logger=config.LoggerConfig(log_interval=1),
        tokenizer=config.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
        checkpoint=config.CheckpointConfig(),
        rng=config.RNGConfig(seed=SEED),
        dist=config.DistributedInitConfig(distributed_backend="gloo"),
    )  # fmt: skip


@contextmanager
def recorded(loop: Any, weights: dict[str, Any]) -> Iterator[Any]:
    """Models begin with ``weights``, or NaN if there are none; the context gives what tells the
    outcome of the module ``loop``, and its models. Parameters report CUDA types, since every step
    asserts them."""
    from megatron.core.models.gpt import GPTModel

    from lctw_megatron.platform.cpu import optimizer_construction

    losses: list[dict[str, float]] = []
    models: list[Any] = []
    initialize, log = GPTModel.__init__, loop.training_log

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                begin = torch.from_numpy(weights[name]) if weights else torch.tensor(torch.nan)
                parameter.copy_(begin)
        models.append(self)

    def training_log(report: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        losses.append({name: float(value) for name, value in report.items()})
        return log(report, *args, **kwargs)

    def outcome() -> Outcome:
        named = models[0].named_parameters()
        return losses, {name: parameter.detach().numpy().copy() for name, parameter in named}

    with (
        mock.patch.object(GPTModel, "__init__", build),
        mock.patch.object(loop, "training_log", training_log),
        optimizer_construction(),
    ):
        yield outcome, models


class Absent:
    """Finds packages that are not installed, or of no use without a GPU, as modules of nothing:
    Megatron-Bridge imports them at its top and a small run asks nothing of them."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == package or name.startswith(f"{package}.") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name, __path__=[], __version__="0")
        module.__spec__, module.__name__ = spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass
