"""Text to token ids and back: SentencePiece models and Hugging Face tokenizer folders.

What transformers' AutoTokenizer makes of a folder is what is meant by it; version 4's, where one of
5's classes (GPT2Tokenizer, Qwen2Tokenizer) cuts texts otherwise than tokenizer.json. transformers
is imported only for what `tokenizers` and `sentencepiece` cannot do. SentencePiece, the faster,
encodes for a folder whose other files say the same as its model file (Llama 2's): one identity.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as FastTokenizer

from lctw_megatron.data.added_tokens import follow_small_files
from lctw_megatron.data.first_token import first_token
from lctw_megatron.data.git_lfs import refuse_pointers
from lctw_megatron.data.json_object import parse_json, read_json_object
from lctw_megatron.data.manifest import TokenizerIdentity
from lctw_megatron.data.sentencepiece_model import (
    SPACE,
    breaks_at_newlines,
    parts_of,
    read_settings,
    to_fast_tokenizer,
)
from lctw_megatron.data.special_tokens import read_special_tokens
from lctw_megatron.data.tokenizer_files import (
    CONFIG,
    copy_token_config,
    copy_tokenizer_files,
    has_tokenizer,
)
from lctw_megatron.errors import InputError, one_line

REPLACEMENT = "\ufffd"
"""Stands for bytes that are no text on their own."""


class Tokenizer(ABC):
    """What the project asks of a tokenizer."""

    identity: TokenizerIdentity

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens], without BOS and EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; BOS, EOS and other special tokens are left out."""

    @abstractmethod
    def token_text(self, id: int) -> str:
        """What one token stands for: its text, the name of a special token, or U+FFFD for a part
        of a character."""

    @abstractmethod
    def save_hf(self, directory: str | os.PathLike[str]) -> None:
        """Write the files from which transformers' AutoTokenizer makes this tokenizer into
        ``directory``, which need not exist."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as a stored document: BOS first and EOS last, where there are any."""
        known = self.identity
        first = [] if known.first_id is None else [known.first_id]
        last = [known.eos_id] if known.add_eos else []
        before, after = np.array(first, np.int32), np.array(last, np.int32)
        return [np.concatenate([before, ids, after]) for ids in self.encode_batch(texts)]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """From a SentencePiece .model file or a Hugging Face tokenizer folder; InputError otherwise."""
    place = Path(os.path.abspath(path))
    if place.is_file() and place.suffix == ".model":
        refuse_pointers([place])
        return SentencePieceTokenizer(place)
    if not place.is_dir():
        found = (
            "is a file that does not end in .model" if place.exists() else "no such file or folder"
        )
        raise InputError(
            f"tokenizer {place}: {found}; give a SentencePiece .model file or a Hugging Face "
            f"folder with tokenizer.json (Hub names are not looked up)"
        )
    model = place / "tokenizer.model"
    if not has_tokenizer(place):
        raise InputError(
            f"tokenizer {place}: the folder has neither tokenizer.json nor tokenizer.model; "
            "of other files AutoTokenizer.from_pretrained(...).save_pretrained(...) makes the first"
        )
    if not (place / "tokenizer.json").exists():
        refuse_pointers([model])
    specials = read_special_tokens(place)
    described = specials.tokenizer_class or (place / CONFIG).exists()
    if not described and not (place / "tokenizer.json").exists():
        # AutoTokenizer could not tell what it is.
        return SentencePieceTokenizer(model, specials.add_bos)
    tokenizer = HuggingFaceTokenizer(place)
    return (model.exists() and _as_sentencepiece(model, tokenizer)) or tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. BOS is added if the model has one, unless ``add_bos`` is False.

    ``folder``: the Hugging Face folder that it encodes for. Texts that spell out one of its special
    tokens are left to that: to SentencePiece the name is letters.
    """

    def __init__(
        self, path: Path, add_bos: bool | None = None, folder: "HuggingFaceTokenizer | None" = None
    ) -> None:
        self._folder = folder
        self._names = list(folder.vocabulary()[1].values()) if folder is not None else []
        model = path.read_bytes()
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            self._settings = read_settings(model)
            self._in_parts = breaks_at_newlines(self._processor, self._settings)
            self.pieces()  # the library reads pieces that are no text, and gives none
        except Exception as error:  # RuntimeError or ValueError, as the version has it, and others
            raise InputError(f"{path}: not a SentencePiece model ({one_line(error)})") from None
        self._model = model
        self.unk_id = self._processor.unk_id()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.identity = TokenizerIdentity(
            kind="sentencepiece",
            path=str(path),
            digest=hashlib.blake2b(model, digest_size=16).hexdigest(),
            vocab_size=self._processor.get_piece_size(),
            bos_id=bos if bos >= 0 else None,
            eos_id=eos if eos >= 0 else None,
            add_bos=bos >= 0 and add_bos is not False,
            add_eos=eos >= 0,
        )

    def pieces(self) -> dict[str, int]:
        """Its vocabulary."""
        name = self._processor.id_to_piece
        return {name(id): id for id in range(self._processor.get_piece_size())}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._encode(texts)
        for number, text in enumerate(texts):
            if self._folder is not None and any(name in text for name in self._names):
                encoded[number] = self._folder.encode_batch([text])[0]
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not self._in_parts:
            encoded = self._processor.encode(list(texts), num_threads=1)
            return [np.array(ids, np.int32) for ids in encoded]
        # A part begins with a newline, which no piece crosses; only its added space is too much.
        extra = 1 if self._settings.add_dummy_prefix else 0
        results = []
        for text in texts:
            encoded = self._processor.encode(parts_of(text), num_threads=1)
            arrays = [np.array(ids, np.int32) for ids in encoded]
            results.append(np.concatenate([arrays[0], *(ids[extra:] for ids in arrays[1:])]))
        return results

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(id) for id in ids])

    def token_text(self, id: int) -> str:
        piece = self._processor.id_to_piece(int(id))
        return _byte_text(piece) if self._processor.is_byte(int(id)) else piece.replace(SPACE, " ")

    def save_hf(self, directory: str | os.PathLike[str]) -> None:
        if self._folder is not None:
            self._folder.save_hf(directory)
            return
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.model").write_bytes(self._model)
        try:
            fast = to_fast_tokenizer(self._processor, self._settings)
        except ValueError as error:
            print(
                f"tokenizer {self.identity.path}: {error} cannot be written as tokenizer.json; the "
                "model file goes along alone, and transformers reads it in its own way"
            )
            return
        known = self.identity
        name = self._processor.id_to_piece
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": known.add_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "unk_token": name(self._processor.unk_id()),
        }
        if known.bos_id is not None:
            config["bos_token"] = name(known.bos_id)
        if known.eos_id is not None:
            config["eos_token"] = name(known.eos_id)
        fast.save(str(target / "tokenizer.json"))
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


class HuggingFaceTokenizer(Tokenizer):
    """A folder with tokenizer.json, and tokenizer_config.json for BOS and EOS; or with a
    tokenizer.model, for which transformers makes the tokenizer.json.

    Like AutoTokenizer, it reads the name of a special token inside a text as that token. Its
    digest covers what decides the ids: tokenizer.json without its formatting, truncation and
    padding (which are turned off: a document is never cut), or the model file and the added tokens;
    and BOS and EOS.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        self._folder = folder
        source: Any
        if path.exists():
            description = read_json_object(path)
            source = {k: v for k, v in description.items() if k not in ("truncation", "padding")}
            specials = read_special_tokens(folder)
            names = specials.bos, specials.eos
            try:
                self._fast = FastTokenizer.from_file(str(path))
            except Exception as error:  # the library raises plain Exception
                raise InputError(
                    f"{path}: not a tokenizer.json that can be read ({one_line(error)})"
                ) from None
            source |= follow_small_files(folder, self._fast)
        else:
            self._fast, names = _by_transformers(folder)
            description = parse_json(self._fast.to_str())
            model = (folder / "tokenizer.model").read_bytes()
            source = [hashlib.blake2b(model, digest_size=16).hexdigest(), self.vocabulary()[1]]
        self._byte_level = "ByteLevel" in json.dumps(description.get("decoder"))
        self._fast.no_truncation()
        self._fast.no_padding()
        bos, eos = (self._id(name, folder) for name in names)
        first = first_token(self._fast, path)
        # A template may add a token that no file names as BOS, or another; AutoTokenizer adds it.
        bos = bos if first is None else first
        add_bos = first is not None
        content = json.dumps([source, bos, eos, add_bos], sort_keys=True)
        self.identity = TokenizerIdentity(
            kind="huggingface",
            path=str(folder),
            digest=hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
            vocab_size=max(self._fast.get_vocab().values()) + 1,
            bos_id=bos,
            eos_id=eos,
            add_bos=add_bos,
            add_eos=eos is not None,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(result.ids, np.int32) for result in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._fast.decode([int(id) for id in ids])

    def token_text(self, id: int) -> str:
        token = self._fast.id_to_token(int(id))
        if token is None:
            raise IndexError(f"token id {id} is not in the vocabulary of {self._folder}")
        if self._byte_level:
            return self._fast.decode([int(id)], skip_special_tokens=False)
        return _byte_text(token) or token.replace(SPACE, " ")

    def save_hf(self, directory: str | os.PathLike[str]) -> None:
        copy_tokenizer_files(self._folder, Path(directory))
        copy_token_config(self._folder, Path(directory))

    def vocabulary(self) -> tuple[dict[str, int], dict[int, str]]:
        """Its tokens, and those that are one wherever a text has their name."""
        added = self._fast.get_added_tokens_decoder().items()
        return self._fast.get_vocab(with_added_tokens=True), {id: t.content for id, t in added}

    def _id(self, name: str | None, folder: Path) -> int | None:
        if name is None:
            return None
        id = self._fast.token_to_id(name)
        if id is None:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: its special token {name!r} is not in the "
                f"vocabulary of tokenizer.json; the two files are not of one tokenizer"
            )
        return id


def _by_transformers(folder: Path) -> tuple[FastTokenizer, tuple[str | None, str | None]]:
    """What AutoTokenizer makes of a folder with tokenizer.model alone; its BOS and EOS."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return found.backend_tokenizer, (found.bos_token, found.eos_token)
    except Exception as error:  # whatever its converters raise
        raise InputError(
            f"tokenizer {folder}: transformers cannot read its tokenizer.model together with the "
            f"tokens that its other files add ({one_line(error)}); add tokenizer.json, as "
            "AutoTokenizer's save_pretrained writes it"
        ) from None


_PROBE = """ Two  spaces,\ttabs\n\n  and (lines);\n\n\n    if x[0] != -3.14e+05: # indented
Größe, naïve, Ωμέγα, Привет, \u4f60\u597d, \u3053\u3093, \u0e2a\u0e27
\u202e\U0001f600 e\u0301\u00a0"""


def _as_sentencepiece(model: Path, folder: HuggingFaceTokenizer) -> SentencePieceTokenizer | None:
    """The model file as a faster encoder for its folder; None unless vocabulary, BOS, EOS, added
    tokens and the ids of a text agree, or if it is no SentencePiece model (Llama 3's has the ranks
    of tiktoken)."""
    try:
        tokenizer = SentencePieceTokenizer(model, folder.identity.add_bos, folder)
    except InputError:
        return None
    ours, theirs = tokenizer.identity, folder.identity
    pieces, (vocabulary, added) = tokenizer.pieces(), folder.vocabulary()
    basic = {ours.bos_id, ours.eos_id, tokenizer.unk_id}
    agree = (
        (ours.bos_id, ours.eos_id, ours.add_bos) == (theirs.bos_id, theirs.eos_id, theirs.add_bos)
        and pieces == vocabulary
        and added.keys() <= basic
        and all(map(np.array_equal, *(t.encode_batch([_PROBE]) for t in (tokenizer, folder))))
    )
    return tokenizer if agree else None


def _byte_text(piece: str) -> str:
    """The character of a byte piece <0xNN>; empty if ``piece`` is none."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        byte = int(piece[3:5], 16)
        return chr(byte) if byte < 128 else REPLACEMENT
    return ""
