"""Which file names BOS and EOS is decided as AutoTokenizer does, or not at all."""

import json
import subprocess
import sys

import pytest

from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError

NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
KNOWN = {str(id): {"content": name, "special": True} for id, name in enumerate(NAMED.values())}
AUTO = """
import json, sys
from transformers import AutoTokenizer
tokenizers = map(AutoTokenizer.from_pretrained, sys.argv[1:])
json.dump([[each.bos_token_id, each.eos_token_id] for each in tokenizers], sys.stdout)
"""


def test_bos_and_eos_are_those_of_autotokenizer(folder_with):
    base = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    other = {"special_tokens_map": {"eos_token": "<|begin|>"}}
    folders = [
        folder_with(base, "overridden", **other),
        folder_with(base | {"added_tokens_decoder": KNOWN}, "unread", **other),
        folder_with(base, "removed", special_tokens_map={"eos_token": None}),
        folder_with(base | {"eos_token": "<gone>"}, "mended", **other),
    ]
    known = [load_tokenizer(folder).identity for folder in folders]
    assert [(each.bos_id, each.eos_id) for each in known] == [(0, 0), (0, 1), (0, None), (0, 0)]
    # In a process of its own: transformers imports torch.
    command = [sys.executable, "-c", AUTO, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [[each.bos_id, each.eos_id] for each in known]


def test_a_map_that_transformers_does_not_read_is_not_guessed_from(folder_with):
    folder = folder_with({"added_tokens_decoder": KNOWN}, special_tokens_map=NAMED)
    with pytest.raises(InputError, match="map.json: its bos_token is not read by transformers, be"):
        load_tokenizer(folder)
    said = {"added_tokens_decoder": KNOWN, "bos_token": None, "eos_token": "<|end|>"}
    known = load_tokenizer(folder_with(said, "said", special_tokens_map=NAMED)).identity
    assert known.eos_id == 1
