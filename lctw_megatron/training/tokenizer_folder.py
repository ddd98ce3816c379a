"""The tokenizer folder that goes into a run's checkpoints, with what else came with the model."""

import shutil
from pathlib import Path

from lctw_megatron.atomic import atomic_directory
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.tokenizer_files import CONFIG, GENERATION_CONFIG, has_tokenizer
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError


def write_tokenizer_files(identity: TokenizerIdentity, start: Path | None, folder: Path) -> None:
    """Make ``folder`` from the tokenizer folder of the data, whole; where the data name a model
    file alone, from the start's, whose tokenizer is the same (compatibility.complete_run).
    Generation settings that the data's folder lacks are the start's.

    Raises InputError if the tokenizer is another now than when the data were tokenised.
    """
    source = Path(identity.path)
    from_start = start is not None and has_tokenizer(start)
    tokenizer = load_tokenizer(source) if source.exists() else None
    if tokenizer and tokenizer.identity.digest != identity.digest:
        raise InputError(
            f"tokenizer {source}: its digest is {tokenizer.identity.digest}, but the data were "
            f"tokenised with {identity.digest}; restore its files, or preprocess again"
        )
    if tokenizer is None and not from_start:
        print(f"{source}: not found, so the checkpoints carry no tokenizer files")
        return
    with atomic_directory(folder) as target:
        if tokenizer is None or (from_start and not source.is_dir()):
            assert start is not None
            shutil.copytree(start, target, dirs_exist_ok=True)
            return
        tokenizer.save_hf(target)
        if start is not None and not (target / GENERATION_CONFIG).exists():
            for name in (GENERATION_CONFIG, CONFIG):
                if (start / name).is_file():
                    shutil.copyfile(start / name, target / name)
