"""Which random numbers dropout draws: a function of the run's seed, the step and the rank's place.

megatron-core keeps two states on a rank: one for what tensor-parallel ranks hold alike, which must
be equal on them, and one for what they hold in parts, to whose seed it adds the tensor rank. Both
follow from one seed. Pipeline stages, data and context ranks work on other layers or other tokens
and get a seed each; nothing is carried from step to step, so that a resume needs no state.
"""

import hashlib

from megatron.core import parallel_state, tensor_parallel


def seed_dropout(seed: int, step: int) -> None:
    """Set this rank's random states for optimizer step ``step`` of a run with ``seed``."""
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    # Hashed: step 1 of seed 1 shall not be step 0 of seed 2.
    digest = hashlib.blake2b(repr((seed, step, place)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 2  # signed, and with room for what is added
    # The tracker is reseeded, not replaced: TransformerEngine's attention keeps the one that it was
    # built with, and would go on with that one's states.
    tensor_parallel.model_parallel_cuda_manual_seed(number)
