"""Which documents a training step of a run was made of."""

from pathlib import Path

from lctw_megatron.config.load import load_run
from lctw_megatron.data.loader import TokenLoader, TracedSample
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.data.token_text import TokenTexts
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint_folder import complete_checkpoints
from lctw_megatron.report.coloured_text import visible

_EXCERPT_TOKENS = 16


def step_documents(run_dir: str | Path, step: int) -> list[TracedSample]:
    """The sequences of the global batch of ``step`` (counted from 0) and their pieces.

    Reads run.yaml and, for runs whose batch size has changed, the newest checkpoint's loader state.
    Raises InputError.
    """
    folder = Path(run_dir)
    config = folder / "run.yaml"
    if not config.is_file():
        raise InputError(f"{config}: no such file; --step needs the folder of a run")
    run = load_run(config)
    if not 0 <= step < run.training.steps:
        raise InputError(
            f"{folder}: there is no step {step}, the run has 0 to {run.training.steps - 1}"
        )
    loader = TokenLoader(
        run.data,
        seed=run.seed,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=1,
    )
    try:
        state = _loader_state(folder)
        if state is not None:
            # Other short losses do not change the order of the sequences.
            state["data"] |= {"short losses": [None] * len(loader.sources)}
            if changed := loader.changed_since(state):
                raise InputError(
                    f"{folder}: its newest checkpoint was trained on other data than its run.yaml "
                    f"names ({'; '.join(changed.values())}), so what a step read is not known; go "
                    "on with the run until its next checkpoint"
                )
            loader.load_state_dict(state)
        return loader.documents(step)
    finally:
        loader.close()


def describe_step(run_dir: str | Path, step: int) -> str:
    """``step_documents`` in words, with the first tokens of each piece."""
    lines = [f"{run_dir}, step {step}:"]
    texts: dict[str, tuple[TokenDataset, TokenTexts | None]] = {}
    for item in step_documents(run_dir, step):
        if item.prefix not in texts:
            dataset = TokenDataset(item.prefix)
            texts[item.prefix] = dataset, _texts(dataset)
        dataset, token_texts = texts[item.prefix]
        lines.append(
            f"  sample {item.sample}: sequence {item.sequence} of {item.prefix}, epoch {item.epoch}"
        )
        for document, offset, length in item.pieces:
            excerpt = ""
            if token_texts is not None:
                count = min(length, _EXCERPT_TOKENS)
                text = "".join(token_texts(dataset.get(document, offset, count)))
                excerpt = ": " + " ".join(visible(text).split())
            lines.append(f"    document {document}, tokens {offset} to {offset + length}{excerpt}")
    return "\n".join(lines)


def _texts(dataset: TokenDataset) -> TokenTexts | None:
    """None where the tokenizer is not where it was, or is another by now."""
    identity = dataset.manifest.tokenizer
    if not Path(identity.path).exists():
        return None
    tokenizer = load_tokenizer(identity.path)
    return TokenTexts(tokenizer) if tokenizer.identity.digest == identity.digest else None


def _loader_state(folder: Path) -> dict | None:
    from lctw_megatron.model.checkpoint import read_manifest

    checkpoints = complete_checkpoints(folder / "checkpoints")
    return read_manifest(checkpoints[-1]).loader if checkpoints else None
