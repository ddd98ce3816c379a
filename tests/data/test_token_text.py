"""Texts of single tokens, side by side, are the text."""

import pytest

from lctw_megatron.data.token_text import TokenTexts
from lctw_megatron.data.tokenizers import load_tokenizer
from tests.tokenizer_files import hf_folder, sentencepiece_model

__all__ = ["hf_folder", "sentencepiece_model"]

TEXT = "def größe(x):\n\treturn x  # 世界 🙂 naïve – end\n"


@pytest.mark.parametrize("kind", ["hf_folder", "sentencepiece_model"])
def test_texts_join_to_the_text_although_characters_are_cut(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    ids = tokenizer.encode_batch([TEXT])[0]
    texts = TokenTexts(tokenizer)(ids)
    assert len(texts) == len(ids)
    assert "".join(texts).removeprefix(" ") == TEXT
    assert len(ids) > len([text for text in texts if text])  # some hold parts of characters only
    assert "\ufffd" not in "".join(texts)


@pytest.mark.parametrize("kind", ["hf_folder", "sentencepiece_model"])
def test_which_asks_of_every_token_what_its_text_says(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    texts = TokenTexts(tokenizer)
    tests = str.isalpha, str.isascii, lambda text: text.endswith("\n"), lambda text: text == ""
    for text in (TEXT, TEXT * 3, "🙂", "a", ""):
        ids = tokenizer.encode_batch([text])[0]
        for part in (ids, ids[1:], ids[:-2]):  # also from and to the middle of a character
            found = texts.which(part, *tests)
            assert found.tolist() == [[test(word) for word in texts(part)] for test in tests]


def test_special_and_unknown_ids_are_named(sentencepiece_model):
    texts = TokenTexts(load_tokenizer(sentencepiece_model))
    assert texts([1, 2]) == ["<s>", "</s>"]
    assert texts([123456]) == ["<id 123456>"]
