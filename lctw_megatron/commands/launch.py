"""Run a recipe from corpus to report, here or as a chain of SLURM jobs."""

import argparse

from lctw_megatron.cli import positive, run_command

EPILOG = """\
again:
  launch.py status WHERE   where every stage and run stands: step, tokens/s, time left, last
                           checkpoint and error, whether it is alive
  launch.py watch WHERE    the same, again and again, until everything is done (status 0) or
                           nothing is under way any more (1)
  launch.py resume FOLDER  run, or submit, what is missing in an output folder, as it was launched

WHERE is a recipe, its output folder or the folder of one run.

Stages are prepare, train-RUN, score (score-PREFIX with several datasets), export-RUN, verify-RUN,
evaluate-RUN, recall-RUN and report. Finished ones are skipped; their marks, scripts and logs are in
OUTPUT_DIR/launch. --debug shows tracebacks, --version the version.

examples:
  python tools/launch.py recipes/quickstart/recipe.yaml
  python tools/launch.py recipe.yaml --cluster slurm --dry-run
  python tools/launch.py recipe.yaml --cluster slurm_h100 --stages train export
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s RECIPE.yaml [options]\n"
        "       %(prog)s status|watch WHERE\n       %(prog)s resume FOLDER",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE.yaml", help="the recipe")
    add(
        "--cluster",
        metavar="NAME",
        help="submit to SLURM: `slurm` takes the recipe's cluster section, any other name a "
        "fragment of configs/clusters or a .yaml file",
    )
    add(
        "--stages",
        metavar="STAGE",
        nargs="+",
        default=[],
        help="only these, by name or kind (train is every train-RUN)",
    )
    add(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="override a field of the recipe; may be given several times",
    )
    add(
        "--ranks",
        type=positive,
        metavar="N",
        help="here: ranks of training and scoring; default: the GPUs, on a CPU the layout's fewest",
    )
    add("--dry-run", action="store_true", help="print the commands or scripts, run nothing")
    return parser


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("status", "watch", "resume") and "--help" not in arguments:
        return again(*arguments)
    options = parser().parse_args(arguments)

    from lctw_megatron.launch.launch_request import LaunchRequest, run_request

    request = LaunchRequest(
        options.recipe,
        tuple(options.overrides),
        tuple(options.stages),
        options.cluster,
        options.ranks,
    )
    return run_request(request, options.dry_run)


def again(verb: str, *arguments: str) -> int:
    if len(arguments) != 1:
        what = "" if verb == "resume" else ", its recipe, or the folder of a run"
        parser().error(f"{verb}: give the output folder of a recipe{what}")

    from lctw_megatron.launch.launch_request import read_request, run_request
    from lctw_megatron.launch.status import status, watch

    if verb == "resume":
        return run_request(read_request(arguments[0]), output_dir=arguments[0])
    return status(arguments[0]) if verb == "status" else watch(arguments[0])


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
