"""Whether a held-out dataset has what is to be measured."""

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
