"""A Hugging Face folder as the harness will read it."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from lctw_megatron.data.json_object import read_json_object
from lctw_megatron.data.tokenizer_files import CONFIG, has_tokenizer
from lctw_megatron.data.tokenizers import Tokenizer, load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.evaluation.recall_tasks import SENTENCES

MOST_TOKENS_A_WORD = 2.2
"""Of a tokenizer for ruler_vt: its samples begin with an example of at most 500 tokens and, where
that does not fit, it tries for ever (seen from 2.4 tokens on, at 1,024)."""


class ModelFolder:
    """Config, tokenizer and identity of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        """InputError for what the harness cannot use, or would run code of."""
        self.folder = folder
        config = self._read(CONFIG)
        if config is None:
            raise InputError(
                f"{folder / CONFIG}: missing; give a Hugging Face folder, or a checkpoint with "
                "--checkpoint"
            )
        for name in (CONFIG, "tokenizer_config.json"):
            # RULER loads tokenizers with trust_remote_code.
            if (self._read(name) or {}).get("auto_map"):
                raise InputError(
                    f"{folder / name}: names code of its own (auto_map), which is not run"
                )
        positions = config.get("max_position_embeddings")
        if not isinstance(positions, int) or isinstance(positions, bool) or positions < 1:
            raise InputError(
                f"{folder / CONFIG}: max_position_embeddings is {positions!r}, expected a positive "
                "whole number: the harness takes it for the longest prompt"
            )
        self.positions = positions
        self.dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        if not has_tokenizer(folder):
            raise InputError(f"{folder}: has no tokenizer.json or tokenizer.model")
        known = self.tokenizer.identity
        if known.bos_id is None and known.eos_id is None:
            raise InputError(
                f"{folder}: its tokenizer has neither BOS nor EOS, and the harness needs one; name "
                "eos_token in tokenizer_config.json"
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    def check_length(self, length: int) -> None:
        """InputError if the model was not made for so many tokens, or does not say so."""
        if length > self.positions:
            raise InputError(
                f"{self.folder / CONFIG}: max_position_embeddings is {self.positions}, less than "
                f"--lengths {length}; give smaller lengths, or export a model that was trained on "
                "so many tokens"
            )

    def identity(self) -> str:
        """Changes whenever the weights are written anew; reads config.json and file dates only."""
        digest = hashlib.blake2b((self.folder / CONFIG).read_bytes(), digest_size=16)
        weights = sorted(self.folder.glob("*.safetensors"))
        if not weights:
            raise InputError(f"{self.folder}: holds no *.safetensors file")
        for path in weights:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return read_json_object(self.folder / name)
        except FileNotFoundError:
            return None


def check_words(model: ModelFolder) -> None:
    """InputError for a tokenizer with which ruler_vt would never end."""
    tokens = sum(map(len, model.tokenizer.encode_batch(list(SENTENCES))))
    words = sum(len(sentence.split()) for sentence in SENTENCES)
    if tokens > MOST_TOKENS_A_WORD * words:
        raise InputError(
            f"{model.folder}: its tokenizer takes {tokens / words:.1f} tokens for an English word, "
            f"and ruler_vt can make its samples with at most {MOST_TOKENS_A_WORD}; name the tasks "
            "without it"
        )
