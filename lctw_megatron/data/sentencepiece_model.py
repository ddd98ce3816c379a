"""A SentencePiece model: settings that its API hides, and its Hugging Face form."""

from collections.abc import Iterator
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

SPACE = "\u2581"
"""How SentencePiece writes a space inside pieces."""
_PART_CHARACTERS = 8192
"""SentencePiece slows down on long texts (1.4 MB/s on one of 6 MB, 5.6 MB/s on parts of 8 kB)."""


@dataclass(frozen=True)
class ModelSettings:
    """What the .model file says about algorithm and normalisation."""

    algorithm: str
    """unigram, bpe, word or char."""
    character_map: bytes
    """Compiled rewriting of characters (NFKC and the like); empty: none."""
    add_dummy_prefix: bool
    """A space is put before the text."""
    remove_extra_whitespaces: bool
    whitespace_as_suffix: bool
    user_defined: bool
    """There are pieces that are matched before anything else."""


def read_settings(model: bytes) -> ModelSettings:
    """From the bytes of a .model file, a protobuf message (sentencepiece_model.proto upstream).

    Read by hand: six fields need no schema.
    """
    user_defined = False
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(model):
        if isinstance(value, bytes) and number == 1:
            user_defined |= dict(_fields(value)).get(3) == 4
        elif isinstance(value, bytes) and number == 2:
            trainer.update(_fields(value))
        elif isinstance(value, bytes) and number == 3:
            normalizer.update(_fields(value))
    character_map = normalizer.get(2, b"")
    algorithms = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
    return ModelSettings(
        algorithm=algorithms[int(trainer.get(3, 1))],
        character_map=character_map if isinstance(character_map, bytes) else b"",
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        user_defined=user_defined,
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: integers, or bytes for everything else."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[position : position + length]
        position += length


def breaks_at_newlines(processor: SentencePieceProcessor, settings: ModelSettings) -> bool:
    """Whether encoding may be done in parts that begin with a newline, with the same result.

    True if newlines reach the algorithm unchanged, are known to it, and no piece holds a newline
    and anything else: then no piece can span a newline. So it is for Llama's and Mistral's models
    and for ours.
    """
    if settings.character_map or settings.remove_extra_whitespaces or settings.whitespace_as_suffix:
        return False
    if settings.algorithm not in ("bpe", "unigram"):
        return False
    pieces = (processor.id_to_piece(id) for id in range(processor.get_piece_size()))
    if any("\n" in piece for piece in pieces):
        return False
    lead = [processor.piece_to_id(SPACE)] if settings.add_dummy_prefix else []
    newline = processor.encode("\n")
    unknown = processor.unk_id()
    return newline[:-1] == lead and unknown not in newline


def parts_of(text: str) -> list[str]:
    """``text`` cut before newlines, each part at least _PART_CHARACTERS long but the last."""
    parts, begin = [], 0
    while (end := text.find("\n", begin + _PART_CHARACTERS)) >= 0:
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def to_fast_tokenizer(processor: SentencePieceProcessor, settings: ModelSettings) -> FastTokenizer:
    """The `tokenizers` form of a BPE or unigram model. ValueError for what has none.

    transformers has a converter of its own, whose ids are SentencePiece's in some releases only:
    tests/data/test_sentencepiece_converter.py.

    Known differences: text that spells out a control symbol, such as ``<s>``, becomes that symbol,
    as in every Hugging Face tokenizer (SentencePiece reads it as letters); and a unigram model's
    ties, such as two ways to cut a run of spaces, may fall the other way.
    """
    if settings.user_defined or settings.whitespace_as_suffix:
        raise ValueError("SentencePiece models with user-defined symbols or suffixed whitespace")
    size = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(id) for id in size]
    byte_fallback = any(processor.is_byte(id) for id in size)
    model: models.Model
    if settings.algorithm == "bpe":
        model = models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=_merges(processor, pieces),
            unk_token=pieces[processor.unk_id()],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    elif settings.algorithm == "unigram":
        scored = [(piece, processor.get_score(id)) for id, piece in enumerate(pieces)]
        model = models.Unigram(scored, unk_id=processor.unk_id(), byte_fallback=byte_fallback)
    else:
        raise ValueError(f"SentencePiece models of the type {settings.algorithm}")
    fast = FastTokenizer(model)
    fast.normalizer = normalizers.Sequence(_normalizers(settings))
    strip = [decoders.Strip(" ", 1, 0)] if settings.add_dummy_prefix else []
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [id for id in size if processor.is_control(id) or processor.is_unknown(id)]
    fast.add_special_tokens([AddedToken(pieces[id], special=True) for id in control])
    bos = processor.bos_id()
    if bos >= 0:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{pieces[bos]} $A",
            special_tokens=[(pieces[bos], bos)],
        )
    return fast


def _merges(processor: SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best-scored pieces first."""
    ids = {
        piece: id
        for id, piece in enumerate(pieces)
        if not (processor.is_byte(id) or processor.is_control(id) or processor.is_unknown(id))
    }
    merges = []
    for piece in sorted(ids, key=lambda piece: -processor.get_score(ids[piece])):
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda split: (ids[split[0]], ids[split[1]]))
    return merges


def _normalizers(settings: ModelSettings) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if settings.character_map:
        steps.append(normalizers.Precompiled(settings.character_map))
    if settings.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if settings.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps
