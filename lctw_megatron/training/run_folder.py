"""One run at a time in a run folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lctw_megatron.model.checkpoint import TOKENIZER
from lctw_megatron.ownership import owned
from lctw_megatron.platform.world import on_first_rank
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
