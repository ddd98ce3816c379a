"""Whether a dataset has what a model can read and what is to be measured."""

from collections.abc import Mapping
from typing import Any

from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError


def check_long_enough(dataset: TokenDataset, sequence_length: int) -> None:
    """InputError if no document has a whole sequence and the token after it."""
    longest = int(dataset.lengths.max())
    if longest <= sequence_length:
        raise InputError(
            f"{dataset.prefix}: the longest document has {longest} tokens, but the probes need "
            f"more than --sequence-length {sequence_length}; evaluate shorter sequences or longer "
            "documents"
        )


def check_tokens(
    dataset: TokenDataset, known: Mapping[str, Any], vocab_size: int, model: str
) -> None:
    """InputError, both sides named, unless ``model``, as the user calls it, reads ``dataset``: with
    its tokenizer (``known``: its identity, empty if nobody knows), with BOS where the data have it,
    and of ``vocab_size`` tokens, which are all of the data's."""
    tokenizer, theirs = dataset.manifest.tokenizer, known.get("digest")
    if theirs and theirs != tokenizer.digest:
        raise InputError(
            f"{dataset.prefix} was tokenised with {tokenizer.path} (digest {tokenizer.digest}), "
            f"but the tokenizer of {model} is {theirs} ({known.get('path')}); preprocess with that"
        )
    dataset.check_bos(known, model)
    dataset.check_fits(vocab_size, model)
