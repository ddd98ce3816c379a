"""What came with a model leaves with it unchanged: import, preprocess, score, train, export.

The judge is transformers: AutoTokenizer and GenerationConfig of the folder before and after. Where
the folder leaves the ids to us, they are AutoTokenizer's.
"""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lctw_megatron.config.schema import PrepareConfig
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.data.preprocessing.preprocess import preprocess
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.model.checkpoint import checkpoint_model
from lctw_megatron.scoring.job import Job
from lctw_megatron.scoring.score_corpus import Request, score
from lctw_megatron.scoring.windows import Windowing
from lctw_megatron.training.loop import train
from tests.conversion.hf_models import make_model
from tests.tokenizer_files import real_text
from tests.training.layouts import STRIDE, WINDOW, make_run

VOCABULARY = 600
GENERATION = {"eos_token_id": [4097, 2], "do_sample": True, "temperature": 0.6}
TEXTS = [
    "Hello  world\n\n  <|im_start|>user [INST] x [/INST]<|im_end|>\ny",
    "<s>[TOOL_CALLS] </s>ab",
]
SPECIAL = {"special": True, "lstrip": False, "rstrip": False, "normalized": False,
           "single_word": False}  # fmt: skip


def sentencepiece_files(folder: Path, **options: Any) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(real_text().split("\n")), model_writer=model, model_type="bpe",
        vocab_size=500, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def configure(folder: Path, **values: Any) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>", "add_bos_token": True, "legacy": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | values))


def with_added_tokens(folder: Path, hf_folder: Path) -> None:
    """A SentencePiece folder whose other files add tokens, a template and another EOS."""
    sentencepiece_files(folder)
    names = {"500": "<|im_end|>", "501": "<|im_start|>"}
    configure(
        folder, eos_token="<|im_end|>", pad_token="</s>", model_max_length=2048,
        chat_template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        added_tokens_decoder={id: {"content": name, **SPECIAL} for id, name in names.items()},
    )  # fmt: skip


def of_both_forms(folder: Path, hf_folder: Path) -> None:
    """As Mistral's v3: control symbols of the model file are added tokens of tokenizer.json."""
    from transformers import AutoTokenizer

    control = ["[INST]", "[/INST]", "[TOOL_CALLS]"]
    sentencepiece_files(folder, control_symbols=control)
    configure(folder, additional_special_tokens=control)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists()


def with_several_eos(folder: Path, hf_folder: Path) -> None:
    for path in hf_folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


def of_a_model_file_alone(folder: Path, hf_folder: Path) -> None:
    """Of its control symbols SentencePiece reads none in a text, AutoTokenizer all."""
    sentencepiece_files(folder, control_symbols=["[INST]"], user_defined_symbols=["<|im_start|>"])


def with_nothing_named(folder: Path, hf_folder: Path) -> None:
    """tokenizer.json alone: its template adds BOS, no file names EOS."""
    shutil.copyfile(hf_folder / "tokenizer.json", folder / "tokenizer.json")


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "SentencePiece with added tokens": with_added_tokens,
    "both forms": of_both_forms,
    "a model file alone": of_a_model_file_alone,
    "several EOS": with_several_eos,
    "no EOS named": with_nothing_named,
}


def judged(folder: Path) -> dict[str, Any]:
    """What transformers makes of a folder."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return {
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "specials": tokenizer.special_tokens_map,
        "length": tokenizer.model_max_length,
        "template": tokenizer.chat_template,
        "generation": GenerationConfig.from_pretrained(folder).to_diff_dict(),
        "config": {key: config.get(key) for key in ("bos_token_id", "eos_token_id")},
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_what_came_with_a_model_leaves_with_it(
    name: str, hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_model("llama", tmp_path / "hf", vocab_size=VOCABULARY)
    FOLDERS[name](hf, hf_folder)
    (hf / "generation_config.json").write_text(json.dumps(GENERATION))
    import_hf(hf, tmp_path / "checkpoint")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 40))
    prefix = str(tmp_path / "tokens")
    preprocess(
        PrepareConfig(inputs=[str(corpus)], output_prefix=prefix, tokenizer=str(hf), workers=1)
    )
    assert ("names no EOS" in capsys.readouterr().out) == (name == "no EOS named")
    before = judged(hf)
    eos = [] if name == "no EOS named" else [TokenDataset(prefix).manifest.tokenizer.eos_id]
    for number, ids in enumerate(before["ids"]):
        assert TokenDataset(prefix)[number].tolist() == [*ids, *eos]

    job = Job(prefix, str(tmp_path / "checkpoint"), Windowing(WINDOW, STRIDE))
    sidecar = score(job, Request(), print)
    assert sidecar is not None and sidecar.scored > 0

    run = make_run(prefix, str(tmp_path / "run"), {}, "pack", "dense", "frozen",
                   start=str(tmp_path / "checkpoint"), training={"steps": 1})  # fmt: skip
    model = checkpoint_model(str(tmp_path / "checkpoint"))
    free = {"max_position_embeddings": None}
    run = run.model_copy(update={"model": model.model_copy(update=free)})
    assert train(run) == 0
    export_hf(tmp_path / "run", tmp_path / "back")
    assert judged(tmp_path / "back") == before
    settings = (tmp_path / "back" / "generation_config.json").read_text()
    assert json.loads(settings) == GENERATION
