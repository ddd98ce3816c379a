import io

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lctw_megatron.data.sentencepiece_model import (
    breaks_at_newlines,
    read_settings,
    to_fast_tokenizer,
)
from tests.tokenizer_files import real_text

TEXTS = ["two  spaces ", " a\nb\n", "Grüße ½ 世界 🙂", "", "x" * 50, real_text()[:3000]]


def train(**settings):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(real_text().split("\n")),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 400, "byte_fallback": True, **settings},
    )
    content = model.getvalue()
    return SentencePieceProcessor(model_proto=content), read_settings(content)


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = {"model_type": "bpe", "allow_whitespace_only_pieces": True, **PLAIN}


def test_settings_are_read_from_the_file():
    _, settings = train(**LLAMA)
    assert settings.algorithm == "bpe"
    assert settings.character_map == b""
    assert settings.add_dummy_prefix
    assert not settings.remove_extra_whitespaces
    assert not settings.user_defined
    _, settings = train(model_type="unigram", add_dummy_prefix=False, user_defined_symbols=["<x>"])
    assert settings.algorithm == "unigram"
    assert len(settings.character_map) > 1000
    assert not settings.add_dummy_prefix
    assert settings.remove_extra_whitespaces
    assert settings.user_defined


@pytest.mark.parametrize(
    "settings, expected",
    [
        (LLAMA, True),
        ({**LLAMA, "add_dummy_prefix": False}, True),
        ({"model_type": "unigram", **PLAIN}, True),
        ({"model_type": "bpe"}, False),  # nmt_nfkc makes spaces of newlines
        ({**LLAMA, "remove_extra_whitespaces": True}, False),
        ({**LLAMA, "treat_whitespace_as_suffix": True}, False),
        ({**LLAMA, "byte_fallback": False}, False),  # runs of unknown characters are one token
        ({**LLAMA, "user_defined_symbols": ["\n\n"]}, False),
    ],
)
def test_parts_are_used_only_where_no_piece_can_cross_a_newline(settings, expected):
    assert breaks_at_newlines(*train(**settings)) is expected


@pytest.mark.parametrize(
    "settings",
    [
        LLAMA,
        {**LLAMA, "add_dummy_prefix": False},
        {**LLAMA, "remove_extra_whitespaces": True},
        {"model_type": "bpe"},
        {"model_type": "bpe", "byte_fallback": False},
        {"model_type": "unigram"},
        {"model_type": "unigram", **PLAIN},
    ],
    ids=str,
)
def test_the_hugging_face_form_gives_the_same_ids(settings):
    processor, known = train(**settings)
    fast = to_fast_tokenizer(processor, known)
    for text in TEXTS:
        ids = processor.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids
        if processor.unk_id() not in ids:  # which one writes as a sign and the other leaves out
            assert fast.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("settings", [{"model_type": "char"}, {"user_defined_symbols": ["<x>"]}])
def test_models_without_such_a_form_are_refused(settings):
    with pytest.raises(ValueError, match="SentencePiece models"):
        to_fast_tokenizer(*train(**settings))
