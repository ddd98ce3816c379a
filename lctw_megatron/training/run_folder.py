"""One run at a time in a run folder, and what it says of itself."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lctw_megatron.atomic import atomic_file
from lctw_megatron.config.load import dump_yaml
from lctw_megatron.config.schema import RunConfig
from lctw_megatron.model.checkpoint import TOKENIZER
from lctw_megatron.ownership import owned
from lctw_megatron.platform.world import on_first_rank
from lctw_megatron.training.earlier_run import set_aside
from lctw_megatron.work_folder import remove_leftovers


@contextmanager
def one_run_in(run_dir: Path) -> Iterator[None]:
    """Own the run folder while this run lasts; InputError on the first rank if another run does,
    SystemExit on the others, before anything in it is touched."""
    with ExitStack() as held:

        def enter() -> None:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(owned(run_dir / ".lock", str(run_dir)))
            for name in ("run.yaml", "metrics.jsonl", "heartbeat.json", "trackers.json", TOKENIZER):
                remove_leftovers(run_dir / name, lambda line: print(line, flush=True))

        on_first_rank(enter)
        yield


def write_settings(run: RunConfig, first_step: int) -> None:
    """RUN_DIR/run.yaml: what the run is trained with from ``first_step`` on, once what is of an
    earlier training has another name. One that has no step left was not trained with what it is
    given now, and keeps its file."""
    path = Path(run.run_dir) / "run.yaml"
    begins = first_step < run.training.steps
    if begins:
        set_aside(run, first_step)
    if begins or not path.exists():
        with atomic_file(path, "w") as file:
            file.write(dump_yaml(run))
