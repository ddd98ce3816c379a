"""Small real tokenizers, trained on the standard library's own source: fixtures, one a session."""

import io
import json
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 500


@cache
def real_text() -> str:
    """75 kB of Python with long lines, deep indentation and some characters beyond ASCII."""
    root = Path(sysconfig.get_path("stdlib"))
    names = ("heapq.py", "textwrap.py", "json/decoder.py", "html/__init__.py")
    return "\n".join((root / name).read_text() for name in names) + "\nGrüße, 世界 🙂\n"


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    """A BPE model with byte fallback: <unk> 0, <s> 1, </s> 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(real_text().split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> Path:
    """Byte-level BPE; <|begin|> 0 is put before a text by default, <|end|> 1 is EOS."""
    begin, end = "<|begin|>", "<|end|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(begin, special=True), AddedToken(end, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([real_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 0)]
    )
    folder = tmp_path_factory.mktemp("huggingface")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder_with(hf_folder, tmp_path):
    """A folder of the same tokenizer.json and other small files."""

    def make(config, name="folder", **others):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(hf_folder / "tokenizer.json", folder)
        files = {"tokenizer_config": config, **others}
        for file, contents in files.items():
            (folder / f"{file}.json").write_text(json.dumps(contents))
        return folder

    return make
