"""Training a SentencePiece model on a bounded, deterministic sample of the corpus."""

import io
from collections.abc import Iterator, Sequence

from sentencepiece import SentencePieceTrainer

from lctw_megatron.data.preprocessing.corpus import Shard
from lctw_megatron.data.preprocessing.documents import read_documents
from lctw_megatron.data.preprocessing.token_shard import ShardSettings
from lctw_megatron.errors import InputError

_BYTES_PER_PIECE = 2000
_SMALLEST_SAMPLE = 4 << 20
_LARGEST_SAMPLE = 200 << 20
_LINE_CHARACTERS = 1000
"""Longer lines are cut: the trainer leaves out sentences of more than 4192 bytes."""
_SAMPLED_SHARDS = 64


def train_sentencepiece(
    shards: Sequence[Shard], vocab_size: int, settings: ShardSettings, scratch: str
) -> bytes:
    """The bytes of a .model file: BPE, byte fallback, nothing normalised, so that decoding gives
    back every text, but for U+2581, which is a space to the library. Ids 0, 1, 2 are <unk>, <s>,
    </s>, as in Llama's models. The same corpus gives the same bytes.

    Runs of spaces may be pieces (code needs them), digits stay single, newlines are bytes. Raises
    InputError if the corpus is too small or too varied for ``vocab_size``.
    """
    model = io.BytesIO()
    unread: list[Exception] = []

    def sample() -> Iterator[str]:
        try:
            yield from _sample(shards, vocab_size, settings, scratch)
        except (InputError, OSError) as error:  # of which the library would make its own
            unread.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=sample(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=4,  # it is saved in the model, so it must not depend on the machine
            minloglevel=2,
        )
    except Exception as error:  # RuntimeError or ValueError, as the version has it
        if unread:
            raise unread[0] from None
        reason = str(error).rsplit("] ", 1)[-1].rstrip(". ")
        raise InputError(
            f"--train-sentencepiece {vocab_size}: training failed ({reason}); the corpus may be "
            f"too small for this vocabulary, or the vocabulary too small for its characters"
        ) from None
    return model.getvalue()


def _sample(
    shards: Sequence[Shard], vocab_size: int, settings: ShardSettings, scratch: str
) -> Iterator[str]:
    """Lines from the beginnings of up to 64 shards, evenly spaced over the corpus."""
    wanted = min(max(vocab_size * _BYTES_PER_PIECE, _SMALLEST_SAMPLE), _LARGEST_SAMPLE)
    count = min(len(shards), _SAMPLED_SHARDS)
    chosen = [shards[number * len(shards) // count] for number in range(count)]
    for number, shard in enumerate(chosen):
        left = share = wanted // (count - number)
        for text in _texts(shard, settings, scratch):
            for line in text[:left].split("\n"):
                for begin in range(0, len(line), _LINE_CHARACTERS):
                    yield line[begin : begin + _LINE_CHARACTERS]
            left -= len(text)
            if left <= 0:
                break
        wanted -= share - max(left, 0)


def _texts(shard: Shard, settings: ShardSettings, scratch: str) -> Iterator[str]:
    for part in shard:
        for document in read_documents(
            part, settings.text_field, settings.skip_bad, scratch, settings.max_document_bytes
        ):
            if document.text:
                yield document.text
