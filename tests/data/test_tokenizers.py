import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lctw_megatron.data.sentencepiece_model import parts_of
from lctw_megatron.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from lctw_megatron.errors import InputError
from tests.tokenizer_files import VOCAB_SIZE, real_text

TEXTS = ["def f(x):\n\treturn  x\n", " leading", "", "Grüße, 世界 🙂\n\n\n", "a\0b\r\nc" * 3]


@pytest.fixture(params=["sentencepiece_model", "hf_folder"])
def path(request):
    return request.getfixturevalue(request.param)


def test_decoding_gives_back_the_text(path):
    tokenizer = load_tokenizer(path)
    texts = [*TEXTS, real_text()]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text


def test_the_texts_of_tokens_join_to_the_text(path):
    tokenizer = load_tokenizer(path)
    text = "def f(x):\n\treturn  x\n"
    (ids,) = tokenizer.encode_batch([text])
    assert "".join(tokenizer.token_text(id) for id in ids).removeprefix(" ") == text
    (ids,) = tokenizer.encode_batch(["世"])  # three bytes, three tokens
    assert {tokenizer.token_text(id) for id in ids} <= {" ", "\ufffd"}
    assert tokenizer.token_text(tokenizer.identity.eos_id) in {"</s>", "<|end|>"}


def test_documents_carry_bos_and_eos(path):
    tokenizer = load_tokenizer(path)
    known = tokenizer.identity
    (bare,) = tokenizer.encode_batch(["text"])
    (document,) = tokenizer.encode_documents(["text"])
    assert known.add_bos and known.add_eos
    assert document.tolist() == [known.bos_id, *bare, known.eos_id]
    assert tokenizer.decode(document) == "text"


def test_the_identity_is_content_not_path(path, tmp_path):
    copy = tmp_path / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    first, second = load_tokenizer(path).identity, load_tokenizer(copy).identity
    assert first.digest == second.digest
    assert first.path != second.path
    assert first.vocab_size == VOCAB_SIZE


def test_the_path_in_the_identity_is_absolute(path):
    assert load_tokenizer(os.path.relpath(path)).identity.path == str(path)


@pytest.mark.parametrize("part", [1, 10, 100, 8192])
def test_encoding_in_parts_equals_encoding_whole(sentencepiece_model, monkeypatch, part):
    monkeypatch.setattr("lctw_megatron.data.sentencepiece_model._PART_CHARACTERS", part)
    processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = [*TEXTS, real_text(), "\n" * 20, " \n \n " * 20]
    expected = [processor.encode(text) for text in texts]
    found = load_tokenizer(sentencepiece_model).encode_batch(texts)
    assert [ids.tolist() for ids in found] == expected


@given(st.text("ab\n ", max_size=200), st.integers(1, 20))
def test_parts_join_to_the_text_and_begin_with_newlines(text, size):
    import lctw_megatron.data.sentencepiece_model as module

    before, module._PART_CHARACTERS = module._PART_CHARACTERS, size
    try:
        parts = parts_of(text)
    finally:
        module._PART_CHARACTERS = before
    assert "".join(parts) == text
    assert all(part.startswith("\n") for part in parts[1:])
    assert all(len(part) >= size for part in parts[:-1])


AUTO = """
import json, sys
from transformers import AutoTokenizer
texts, answers = json.load(sys.stdin), []
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    full = [tokenizer(text)["input_ids"] for text in texts]
    answers.append({
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "full": full,
        "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in full],
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    })
json.dump(answers, sys.stdout)
"""


def test_autotokenizer_gives_the_same_ids_from_what_we_read_and_what_we_save(
    sentencepiece_model, hf_folder, tmp_path
):
    saved, in_llama_folder = tmp_path / "saved", tmp_path / "llama"
    load_tokenizer(sentencepiece_model).save_hf(saved)
    shutil.copytree(saved, in_llama_folder)  # AutoTokenizer looks at the model's type, too
    (in_llama_folder / "config.json").write_text('{"model_type": "llama"}')
    ours = {hf_folder: hf_folder, saved: sentencepiece_model, in_llama_folder: sentencepiece_model}
    texts = [*TEXTS, real_text()]
    # In a process of its own: transformers imports torch.
    command = [sys.executable, "-c", AUTO, *map(str, ours)]
    result = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for path, theirs in zip(ours.values(), json.loads(result.stdout), strict=True):
        tokenizer = load_tokenizer(path)
        known = tokenizer.identity
        bare = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
        assert theirs["bare"] == bare
        assert theirs["full"] == [[known.bos_id, *ids] for ids in bare]
        assert theirs["decoded"] == texts
        assert (theirs["bos"], theirs["eos"]) == (known.bos_id, known.eos_id)


def test_saving_keeps_the_identity(path, tmp_path):
    tokenizer = load_tokenizer(path)
    tokenizer.save_hf(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved").identity
    assert saved.model_copy(update={"path": ""}) == tokenizer.identity.model_copy(
        update={"path": ""}
    )


def test_both_forms_with_different_vocabularies_mean_tokenizer_json(
    sentencepiece_model, hf_folder, tmp_path
):
    shutil.copytree(hf_folder, tmp_path / "both")
    shutil.copy(sentencepiece_model, tmp_path / "both" / "tokenizer.model")
    assert load_tokenizer(tmp_path / "both").identity.kind == "huggingface"


def test_a_folder_may_turn_bos_off(sentencepiece_model, tmp_path):
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).identity.add_bos
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not load_tokenizer(tmp_path).identity.add_bos


def edit(folder, target, change):
    shutil.copytree(folder, target)
    description = json.loads((target / "tokenizer.json").read_text())
    change(description)
    (target / "tokenizer.json").write_text(json.dumps(description, indent=3))
    return load_tokenizer(target)


def test_truncation_and_padding_in_tokenizer_json_are_turned_off(hf_folder, tmp_path):
    def truncate(description):
        description["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    known, cut = load_tokenizer(hf_folder), edit(hf_folder, tmp_path / "cut", truncate)
    text = "a text of more than four tokens"
    assert cut.encode_batch([text])[0].tolist() == known.encode_batch([text])[0].tolist()
    assert cut.identity.digest == known.identity.digest


def test_bos_follows_what_the_tokenizer_adds_by_default(hf_folder, tmp_path):
    def remove(description):
        description["post_processor"] = None

    bare = edit(hf_folder, tmp_path / "bare", remove)
    assert bare.identity.bos_id == 0 and not bare.identity.add_bos
    (tmp_path / "bare" / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<|end|>"}}'
    )
    nameless = load_tokenizer(tmp_path / "bare").identity
    assert (nameless.bos_id, nameless.eos_id, nameless.add_eos) == (None, 1, True)


def test_more_than_one_token_before_a_text_is_refused(hf_folder, tmp_path):
    """AutoTokenizer adds both of GLM-4's `[gMASK]<sop>`; a stored document has one or none."""

    def put_before(description):
        template = description["post_processor"]["single"]
        template.insert(0, template[0])

    with pytest.raises(InputError, match=r"makes <\|begin\|>, <\|begin\|>, a of the text 'a'"):
        edit(hf_folder, tmp_path / "two", put_before)


def test_of_both_forms_tokenizer_json_says_whether_bos_is_added(sentencepiece_model, tmp_path):
    load_tokenizer(sentencepiece_model).save_hf(tmp_path / "both")

    def remove(description):
        description["post_processor"] = None

    assert load_tokenizer(tmp_path / "both").identity.add_bos
    bare = edit(tmp_path / "both", tmp_path / "bare", remove)
    assert bare.identity.kind == "sentencepiece" and not bare.identity.add_bos


def test_one_changed_merge_changes_the_digest(hf_folder, tmp_path):
    def change(description):
        description["model"]["merges"].reverse()

    changed = edit(hf_folder, tmp_path / "changed", change)
    assert changed.identity.digest != load_tokenizer(hf_folder).identity.digest


def test_what_is_no_tokenizer_is_named(tmp_path, hf_folder):
    def refuse(path, message):
        with pytest.raises(InputError, match=message):
            load_tokenizer(path)

    refuse(tmp_path / "none", "none: no such file or folder; give a SentencePiece")
    (tmp_path / "text.txt").write_text("x")
    refuse(tmp_path / "text.txt", "text.txt: is a file that does not end in .model")
    (tmp_path / "bad.model").write_text("x")
    refuse(tmp_path / "bad.model", "bad.model: not a SentencePiece model")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "the folder has neither tokenizer.json nor tokenizer.model")
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    refuse(tmp_path / "empty", r"tokenizer\.json: not valid JSON")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    refuse(tmp_path / "empty", r"tokenizer\.json: not a tokenizer\.json that can be read")
    shutil.copy(hf_folder / "tokenizer.json", tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    refuse(tmp_path / "empty", r"tokenizer_config\.json: adds '<gone>', which tokenizer\.json has")


def test_ranks_of_tiktoken_beside_tokenizer_json_are_left_alone(hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert load_tokenizer(tmp_path / "both").identity.digest == (
        load_tokenizer(hf_folder).identity.digest
    )


@pytest.mark.parametrize("value", [2, ["</s>"], {"id": 2}])
def test_a_special_token_in_another_form_is_one_line(hf_folder, tmp_path, value):
    shutil.copytree(hf_folder, tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    with pytest.raises(InputError, match="folder: eos_token is .*, expected the token's text"):
        load_tokenizer(tmp_path / "folder")


def test_the_faster_encoder_reads_the_names_of_special_tokens_as_its_folder_does(
    sentencepiece_model, tmp_path
):
    bare = load_tokenizer(sentencepiece_model)
    bare.save_hf(tmp_path / "both")
    both = load_tokenizer(tmp_path / "both")
    assert both.identity.kind == "sentencepiece"
    whole = HuggingFaceTokenizer(tmp_path / "both")
    texts = ["<s>a</s>", "plain", "a <unk> b\n<s", " x</s> ", ""]
    expected = [ids.tolist() for ids in whole.encode_batch(texts)]
    assert [ids.tolist() for ids in both.encode_batch(texts)] == expected
    # A model file has no such names.
    alone = [ids.tolist() for ids in bare.encode_batch(texts)]
    assert [a == b for a, b in zip(alone, expected, strict=True)] == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_a_model_file_that_has_no_tokenizer_json_goes_along_alone(tmp_path, capsys):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(real_text().split("\n")), model_writer=model, vocab_size=400,
        model_type="bpe", byte_fallback=True, user_defined_symbols=["<x>"], minloglevel=2,
    )  # fmt: skip
    (tmp_path / "a.model").write_bytes(model.getvalue())
    load_tokenizer(tmp_path / "a.model").save_hf(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["tokenizer.model"]
    said = capsys.readouterr().out
    assert "user-defined symbols or suffixed whitespace cannot be written as tokenizer.json" in said
    assert load_tokenizer(tmp_path / "saved").identity.digest == (
        load_tokenizer(tmp_path / "a.model").identity.digest
    )
