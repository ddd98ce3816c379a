"""Example: a recipe of Megatron-Bridge trained with token weights by its own `pretrain`.

    torchrun --nproc-per-node 8 -m lctw_megatron.plugin.pretrain_bridge \\
        --recipe megatron.bridge.recipes.llama.h100.llama3:llama3_8b_pretrain_64gpu_h100_bf16_128k_config \\
        --data-path PREFIX --token-weighting dense

In a script of your own, ``pretrain_weighted`` takes the place of `pretrain`. Written for
Megatron-Bridge 0.6, beside a checkout of Megatron-LM as ``pretrain_gpt.py`` says.
"""  # noqa: E501

from argparse import ArgumentParser
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from megatron.bridge.data import utils as bridge_datasets
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from lctw_megatron.config.load import load_fragment
from lctw_megatron.plugin.dataset import dataset_class
from lctw_megatron.plugin.forward_step import weighted_forward_step


def pretrain_weighted(config: Any, weighting: Mapping[str, Any]) -> None:
    """Megatron-Bridge's pretrain of a ConfigContainer whose dataset is a GPTDatasetConfig."""
    # Its dataset provider looks the class up here, whatever the recipe.
    bridge_datasets.GPTDataset = dataset_class(weighting)
    config.model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False  # goes with it
    pretrain(config, weighted_forward_step(forward_step, weighting))


def main() -> None:
    parser = ArgumentParser(description="A recipe of Megatron-Bridge with token weights.")
    parser.add_argument("--recipe", required=True, help="module:function of a ConfigContainer")
    parser.add_argument("--data-path", nargs="+", required=True, help="as Megatron-LM's")
    parser.add_argument(
        "--token-weighting",
        default="dense",
        help="a fragment of configs/weightings, or the path of such a .yaml file",
    )
    arguments = parser.parse_args()
    module, _, function = arguments.recipe.partition(":")
    config = getattr(import_module(module), function)()
    config.dataset.data_path = arguments.data_path
    pretrain_weighted(
        config, load_fragment("weighting", arguments.token_weighting, "--token-weighting")
    )


if __name__ == "__main__":
    main()
