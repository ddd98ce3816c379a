"""Small files of a folder that say more of tokens than its tokenizer.json: AutoTokenizer goes by
them, so do we, and a token that tokenizer.json has not at all is refused."""

import json
import subprocess
import sys

import pytest

from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError

NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
TOOL = {"content": "<tool>", **FLAGS}
KNOWN = {str(id): {"content": name, **FLAGS} for id, name in enumerate(NAMED.values())}


CONFIG, MAP, ADDED = "tokenizer_config", "special_tokens_map", "added_tokens"


@pytest.mark.parametrize(
    "files, file, name",
    [
        ({CONFIG: {"added_tokens_decoder": {**KNOWN, "500": TOOL}}}, CONFIG, "<tool>"),
        ({CONFIG: {"additional_special_tokens": ["<|end|>", "<tool>"]}}, CONFIG, "<tool>"),
        ({CONFIG: {"extra_special_tokens": [TOOL]}}, CONFIG, "<tool>"),
        ({CONFIG: {"extra_special_tokens": {"tool_token": "<tool>"}}}, CONFIG, "<tool>"),
        ({CONFIG: {"unk_token": "<tool>"}}, CONFIG, "<tool>"),
        ({CONFIG: {"eos_token": "<|im_end|>"}}, CONFIG, "<|im_end|>"),
        ({CONFIG: {}, MAP: {"pad_token": {"content": "[PAD]"}}}, MAP, "[PAD]"),
        ({CONFIG: {}, MAP: {"additional_special_tokens": ["<tool>"]}}, MAP, "<tool>"),
        ({CONFIG: {}, ADDED: {"<|end|>": 1, "<tool>": 500}}, ADDED, "<tool>"),
    ],
)
def test_a_token_that_tokenizer_json_has_not_is_refused(folder_with, files, file, name):
    others = {key: value for key, value in files.items() if key != CONFIG}
    folder = folder_with(NAMED | files[CONFIG], **others)
    with pytest.raises(InputError) as raised:
        load_tokenizer(folder)
    assert str(raised.value) == (
        f"{folder / file}.json: adds {name!r}, which tokenizer.json has not; save the folder again "
        "with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def test_a_token_under_another_id_is_refused(folder_with):
    moved = {"added_tokens_decoder": {"7": KNOWN["1"]}}
    with pytest.raises(InputError, match=r"has '<\|end\|>' as token 7, tokenizer.json as 1; save"):
        load_tokenizer(folder_with(NAMED | moved))
    with pytest.raises(InputError, match=r"added_tokens.json: has '<\|end\|>' as token 7"):
        load_tokenizer(folder_with(NAMED, "other", added_tokens={"<|end|>": 7}))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"added_tokens_decoder": [TOOL]}, "added_tokens_decoder is .*, expected an object"),
        ({"added_tokens_decoder": {"x": TOOL}}, "the id of '<tool>' is x, expected a whole"),
        ({"added_tokens_decoder": {"1": 7}}, "added_tokens_decoder.1 is 7, expected the token's"),
        ({"extra_special_tokens": "<tool>"}, "extra_special_tokens is <tool>, expected an object"),
        ({"extra_special_tokens": [7]}, "extra_special_tokens is 7, expected the token's text"),
    ],
)
def test_other_forms_are_one_line(folder_with, config, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder_with(NAMED | config))


def test_what_tokenizer_json_has_and_what_is_nothing_is_accepted(folder_with, hf_folder):
    config = {
        **NAMED,
        "added_tokens_decoder": KNOWN,
        "additional_special_tokens": ["<|end|>"],
        "extra_special_tokens": {},
        "unk_token": None,
        "pad_token": {"content": "<|end|>"},
        "cls_token": "",
        "fill_token": "<FILL_ME>",  # Code Llama's
    }
    # Not read beside added_tokens_decoder.
    folder = folder_with(config, special_tokens_map={"pad_token": "[PAD]"}, added_tokens={"x": 9})
    assert load_tokenizer(folder).identity.digest == load_tokenizer(hf_folder).identity.digest


AGAIN = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[2])
json.dump(tokenizer("a <tool> b", add_special_tokens=False)["input_ids"], sys.stdout)
"""


def test_saving_again_helps(folder_with, hf_folder, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    folder = folder_with(config | {"added_tokens_decoder": {**KNOWN, "500": TOOL}})
    with pytest.raises(InputError, match="adds '<tool>'"):
        load_tokenizer(folder)
    command = [sys.executable, "-c", AGAIN, str(folder), str(tmp_path / "again")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    again = load_tokenizer(tmp_path / "again")
    assert again.encode_batch(["a <tool> b"])[0].tolist() == json.loads(result.stdout)
    assert again.identity.vocab_size == load_tokenizer(hf_folder).identity.vocab_size + 1


SAME = """
import json, sys
from transformers import AutoTokenizer
texts = json.load(sys.stdin)
tokenizers = map(AutoTokenizer.from_pretrained, sys.argv[1:])
json.dump([[each(text)["input_ids"] for text in texts] for each in tokenizers], sys.stdout)
"""
TEXTS = ["a <|end|> b", "ended in one string <|begin|>", "  for in in:\n"]


def test_what_small_files_say_of_a_known_token_is_what_autotokenizer_makes_of_it(
    folder_with, hf_folder
):
    plain = load_tokenizer(hf_folder)
    word = plain.token_text(id := int(plain.encode_batch(["in"])[0][0]))
    assert word == "in"
    base = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    stripping = {"added_tokens_decoder": KNOWN | {"1": KNOWN["1"] | {"lstrip": True}}}
    folders = [
        folder_with(base | stripping, "stripping"),
        folder_with(base | {"added_tokens_decoder": {**KNOWN, str(id): TOOL | {"content": "in"}}},
                    "decoder"),
        folder_with(base | {"pad_token": "in"}, "named"),
        folder_with(base | {"additional_special_tokens": ["in"]}, "listed"),
        folder_with(base, "map", special_tokens_map={"unk_token": "in"}),
        folder_with(base, "legacy", added_tokens={"in": id}),
        folder_with(base | {"split_special_tokens": True}, "letters"),
        folder_with(base | {"bos_token": "<|end|>"}, "other_bos"),
    ]  # fmt: skip
    command = [sys.executable, "-c", SAME, *map(str, folders)]
    result = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ids = [array.tolist() for array in plain.encode_batch(TEXTS)]
    for folder, theirs in zip(folders, json.loads(result.stdout), strict=True):
        tokenizer = load_tokenizer(folder)
        ours = [array.tolist() for array in tokenizer.encode_batch(TEXTS)]
        assert [[0, *text] for text in ours] == theirs, folder.name  # the template's BOS
        assert tokenizer.identity.add_bos and tokenizer.identity.bos_id == 0, folder.name
        assert (ours != ids) == (folder.name != "other_bos"), folder.name
        assert (tokenizer.identity.digest != plain.identity.digest) == (ours != ids), folder.name
