"""Train a run of a recipe, alone, under torchrun, or under srun as tools/launch.py does."""

import argparse
import sys

from lctw_megatron.cli import positive, run_command
from lctw_megatron.training.exit_status import leaving_when_asked


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Start it again to go on from the newest checkpoint. --debug shows tracebacks, "
        "--version the version.",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument(
        "--run", metavar="NAME", help="which run of the recipe; default: its only one"
    )
    parser.add_argument(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="override a field of the recipe; may be given several times",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, the layout, the memory of one rank and what a checkpoint "
        "costs; train nothing",
    )
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="with --dry-run: how many ranks there will be"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="with --dry-run: memory of the GPU of a rank, for which training.micro_batch_size is "
        "chosen where the recipe leaves it out; default: this machine's, for bf16 without a GPU 80",
    )
    parser.add_argument(
        "--write-speed",
        type=float,
        metavar="GB/S",
        help="with --dry-run: what the file system takes from all ranks together; default: 5",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although data, tokenizer, sequence length, batch size, seed, start, model "
        "settings (but vocab_size), weighting, precision or, of a finished run, anything else that "
        "decides its weights have changed",
    )
    options = parser.parse_args(arguments)
    with leaving_when_asked():
        return _train(options)


def _train(options: argparse.Namespace) -> int:
    from lctw_megatron.config.load import dump_yaml, load_recipe, resolve_run
    from lctw_megatron.errors import InputError
    from lctw_megatron.launch.ahead import check_after_training
    from lctw_megatron.model.checkpoint import checkpoint_model
    from lctw_megatron.model.megatron_fields import check_megatron_fields
    from lctw_megatron.weighting import parse_weighting

    if not options.dry_run:
        for option in ("--ranks", "--memory", "--write-speed"):
            if getattr(options, option[2:].replace("-", "_")) is not None:
                raise InputError(
                    f"{option} is for --dry-run, and changes nothing of a training; add --dry-run, "
                    "or leave it out (torchrun or srun starts the ranks)"
                )
    recipe = load_recipe(options.recipe, options.overrides)
    run = resolve_run(recipe, options.run, checkpoint_model)
    parse_weighting(run.weighting)
    check_megatron_fields(run)
    if options.dry_run:
        check_after_training(recipe, run)
        from lctw_megatron.platform.rank_memory import usable_memory
        from lctw_megatron.training.estimate import describe_layout, planned_device
        from lctw_megatron.training.first_lines import unreached_lines
        from lctw_megatron.training.micro_batch import (
            choose_micro_batch,
            describe_micro_batch,
            with_micro_batch,
        )
        from lctw_megatron.training.save_estimate import WRITE_SPEED, describe_save

        write_speed = WRITE_SPEED if options.write_speed is None else options.write_speed
        if not 0 < write_speed < 1e9:
            raise InputError(f"--write-speed is {write_speed}, expected GB/s above 0")
        if options.memory is not None and not 0 < options.memory < 1e9:
            raise InputError(f"--memory is {options.memory}, expected GiB above 0")
        ranks = options.ranks or run.layout.fewest_ranks
        device, gpu_gib = planned_device(run, options.memory)
        memory = usable_memory(ranks, gpu_gib)
        size = choose_micro_batch(run, ranks, memory, device=device)
        chosen = with_micro_batch(run, size)
        sys.stdout.write(dump_yaml(chosen))
        sys.stdout.write(describe_layout(chosen, options.ranks, device))
        if chosen != run:
            print(describe_micro_batch(chosen, ranks, memory, device))
        lines = describe_save(chosen, options.ranks, write_speed)
        print(*unreached_lines(run.training), *lines, sep="\n")
        return 0

    from lctw_megatron.platform.world import shut_down
    from lctw_megatron.training.loop import train

    status = train(run, options.allow_changes, lambda: check_after_training(recipe, run))
    shut_down()
    return status


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
