"""Example: a GPT trained with token weights by Megatron-LM's own loop. It runs as it is.

    torchrun --nproc-per-node 8 -m lctw_megatron.plugin.pretrain_gpt --token-weighting dense \\
        --calculate-per-token-loss --data-path PREFIX ...        # the arguments of pretrain_gpt.py

In a pretrain_gpt.py of your own two lines do it, before `pretrain` is called:

    GPTDataset = dataset_class(weighting)
    forward_step = weighted_forward_step(forward_step, weighting)

``pretrain`` below is that of megatron-core 0.19, from a checkout of Megatron-LM on PYTHONPATH (the
wheel has megatron.training too, but not the Makefile of its dataset helpers, which it runs first).
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from lctw_megatron.config.load import load_fragment
from lctw_megatron.data import zigzag
from lctw_megatron.plugin.dataset import dataset_class
from lctw_megatron.plugin.forward_step import weighted_forward_step


def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Training, validation and test data, built on every rank."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(
        dataset_class(weighting(args)), num_samples, lambda: True, config
    ).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def get_batch(data_iterator: Iterator[dict[str, Tensor]]) -> list[Tensor]:
    """This context rank's tokens, labels, loss_mask and position_ids, [b, s] each."""
    batch = next(data_iterator)
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return [zigzag.cut(batch[name].cuda(non_blocking=True), rank, size, dim=1) for name in names]


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = (output_tensor.float() * loss_mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens])}


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    tokens, labels, loss_mask, position_ids = get_batch(data_iterator)
    losses = model(tokens, position_ids, None, labels=labels)
    return losses, partial(loss_func, loss_mask)


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument(
        "--token-weighting",
        default="dense",
        help="a fragment of configs/weightings, or the path of such a .yaml file",
    )
    return parser


def weighting(args: Namespace) -> dict[str, Any]:
    return load_fragment("weighting", args.token_weighting, "--token-weighting")


def main() -> None:
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        weighted_forward_step(forward_step, weighting(args)),
    )


if __name__ == "__main__":
    main()
