"""A tokenised corpus: PREFIX.bin, PREFIX.idx and its manifest PREFIX.json."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lctw_megatron.closing import Closing
from lctw_megatron.data.fingerprint import content_fingerprint, sample_digest
from lctw_megatron.data.indexed_array import (
    BLOCK_BYTES,
    IndexedArrayReader,
    IndexedArrayWriter,
    data_path,
)
from lctw_megatron.data.manifest import (
    TokenizerIdentity,
    TokenManifest,
    manifest_path,
    read_manifest,
    remove_manifest,
    write_manifest,
)
from lctw_megatron.errors import InputError


class TokenDataset(IndexedArrayReader):
    """Documents as arrays of token ids, memory-mapped; opens in constant time and memory.

    ``dataset[i]`` is document i, ``dataset.get(i, offset, length)`` a piece of it (read-only views
    of the stored dtype), ``dataset.lengths`` int32 [n] the tokens of each document.

    Opening compares header, sizes, counts and the sample digest with the manifest; ``verify`` reads
    everything. A corpus in Megatron format without a manifest opens too, but has no ``manifest``.
    Raises InputError for missing, empty, damaged or mixed-up files.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        super().__init__(prefix)
        if self.dtype.kind not in "iu":
            raise InputError(
                f"{self.prefix}.idx: holds {self.dtype.name} values, tokens are integers; is this "
                f"the prefix of a sidecar?"
            )
        if self.num_tokens == 0:
            raise InputError(
                f"{self.prefix}.bin: holds no tokens; preprocess a corpus that has text"
            )
        try:
            self._manifest: TokenManifest | None = read_manifest(self.prefix, TokenManifest)
        except FileNotFoundError:
            self._manifest = None
        else:
            self._check_manifest(self._manifest)

    @property
    def num_tokens(self) -> int:
        return self.num_values

    @property
    def manifest(self) -> TokenManifest:
        if self._manifest is None:
            raise InputError(
                f"{manifest_path(self.prefix)}: no such file, so the tokenizer is not known; make "
                f"it with: python tools/inspect_data.py {self.prefix} --write-manifest "
                f"--tokenizer MODEL_OR_DIR"
            )
        return self._manifest

    @property
    def fingerprint(self) -> str:
        """Identity of the content, from the manifest."""
        return self.manifest.fingerprint

    def check_fits(self, vocab_size: int, model: str) -> None:
        """InputError unless ``model``, as the user calls it, has a token for every id. What asks a
        model for anything calls this first; a tokenizer with more tokens does no harm by itself."""
        tokenizer, largest = self.manifest.tokenizer, self.manifest.largest_id
        if largest is None:  # an older manifest: the tokenizer's size settles it, or reading all
            fits = tokenizer.vocab_size <= vocab_size
            largest = -1 if fits else check_vocabulary(self, tokenizer)
        if largest < vocab_size:
            return
        raise InputError(
            f"{self.prefix}: holds token id {largest}, but {model} has a vocabulary of "
            f"{vocab_size} (ids 0 to {vocab_size - 1}); take the model of the tokenizer "
            f"{tokenizer.path}, or preprocess with the model's"
        )

    def check_bos(self, known: Mapping[str, Any], model: str) -> None:
        """InputError if ``model``, as the user calls it, was made with this dataset's tokenizer
        (``known``: its identity there), but with BOS before a text where there is none here, or the
        other way round.

        Asked of SentencePiece models, whose digest leaves it out. What other tools have made is
        taken as it is: there a document without BOS says nothing about the tokenizer.
        """
        ours, theirs = self.manifest.tokenizer, known.get("add_bos")
        if self.manifest.made_elsewhere or ours.kind != "sentencepiece":
            return
        if theirs is None or theirs == ours.add_bos:
            return
        raise InputError(
            f"{self.prefix}: its documents begin {bos_words(ours.add_bos)} (tokenizer "
            f"{ours.path}), but a text of {model} {bos_words(theirs)} (tokenizer "
            f"{known.get('path')}, the same but for BOS); preprocess with the model's tokenizer, "
            "or take a model that has the data's"
        )

    def verify(self) -> None:
        """Read everything: InputError unless index, token ids and fingerprint fit the manifest."""
        self.check_index()
        largest = check_vocabulary(self, self.manifest.tokenizer)
        if self.manifest.largest_id not in (None, largest):
            raise InputError(
                f"{data_path(self.prefix)}: the largest token id is {largest}, but "
                f"{manifest_path(self.prefix)} says {self.manifest.largest_id}: the tokens were "
                "changed; preprocess again"
            )
        found = content_fingerprint(self)
        if found != self.fingerprint:
            raise InputError(
                f"{data_path(self.prefix)}: fingerprint {found}, but {manifest_path(self.prefix)} "
                f"says {self.fingerprint}: the tokens were changed; preprocess again"
            )

    def _check_manifest(self, manifest: TokenManifest) -> None:
        found = {"documents": len(self), "tokens": self.num_tokens, "dtype": self.dtype.name}
        found["sample_digest"] = sample_digest(self.prefix)
        for field, value in found.items():
            expected = getattr(manifest, field)
            if value != expected:
                raise InputError(
                    f"{data_path(self.prefix)}: {field} is {value}, but "
                    f"{manifest_path(self.prefix)} says {expected}: these files are not of one "
                    f"run, or were changed; preprocess again"
                )


def bos_words(added: bool) -> str:
    """How a document begins, for people."""
    return "with BOS" if added else "without BOS"


def check_vocabulary(dataset: IndexedArrayReader, tokenizer: TokenizerIdentity) -> int:
    """Read all tokens and return the largest id: InputError that names the first one outside the
    tokenizer's vocabulary."""
    largest = -1
    step = BLOCK_BYTES // dataset.dtype.itemsize
    for begin in range(0, dataset.num_values, step):
        block = dataset.values[begin : begin + step]
        largest = max(largest, int(block.max()))
        if largest < tokenizer.vocab_size and int(block.min()) >= 0:
            continue
        at = begin + int(((block < 0) | (block >= tokenizer.vocab_size)).argmax())
        itemsize = dataset.dtype.itemsize
        document = int(np.searchsorted(dataset.pointers, at * itemsize, side="right")) - 1
        offset = at - int(dataset.pointers[document]) // itemsize
        raise InputError(
            f"{data_path(dataset.prefix)}: token id {dataset.values[at]} at token {offset} of "
            f"document {document} is beyond the vocabulary of {tokenizer.path} "
            f"({tokenizer.vocab_size} tokens); it was made with another tokenizer"
        )
    return largest


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 where every id fits, with room to spare, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class TokenWriter(Closing):
    """Writes a token dataset; .bin, .idx and .json appear at ``close``, the manifest last.

    A context manager like IndexedArrayWriter. An old manifest goes before the new files come, so
    that no mixture of old and new files is ever complete.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        tokenizer: TokenizerIdentity,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.tokenizer = tokenizer
        self.source = source or {}
        self._array = IndexedArrayWriter(self.prefix, token_dtype(tokenizer.vocab_size))

    @property
    def num_documents(self) -> int:
        return self._array.count

    @property
    def num_tokens(self) -> int:
        return self._array.num_values

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, BOS and EOS included. InputError for an id beyond the vocabulary."""
        size = self.tokenizer.vocab_size
        if len(tokens) and (int(tokens.max()) >= size or int(tokens.min()) < 0):
            at = int(((tokens < 0) | (tokens >= size)).argmax())
            raise InputError(
                f"{self.prefix}: token id {tokens[at]} at token {at} of document "
                f"{self.num_documents} is beyond the vocabulary of {self.tokenizer.path} "
                f"({size} tokens); is its vocabulary file complete?"
            )
        self._array.add(tokens)

    def extend(self, reader: IndexedArrayReader, begin: int = 0, end: int | None = None) -> None:
        """Append documents [begin, end) of a shard by copying its bytes."""
        self._array.extend(reader, begin, end)

    def close(self) -> None:
        self._array.finish()
        remove_manifest(self.prefix)
        self._array.close()
        manifest = TokenManifest(
            fingerprint=self._array.fingerprint,
            sample_digest=sample_digest(self.prefix),
            documents=self.num_documents,
            tokens=self.num_tokens,
            dtype=self._array.dtype.name,
            largest_id=self._array.largest,
            tokenizer=self.tokenizer,
            source=self.source,
        )
        write_manifest(self.prefix, manifest)

    def give_up(self, error: BaseException) -> None:
        self._array.give_up(error)
