"""Damaged tokenizers, token datasets and sidecars are one line or harmless: seeded, with the case
printed. What is read of them is all that preprocessing and training read."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lctw_megatron.config.schema import DataConfig
from lctw_megatron.data.sequence_source import SequenceSource
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from tests.damage import damaged_bytes, damaged_json
from tests.data.small_data import count_up, write_sidecar, write_tokens

SEEDS = {"tokenizer.json": 150, "tokenizer.model": 150, "tokenizer_config.json": 60,
         "special_tokens_map.json": 40, "config.json": 40}  # fmt: skip
TEXTS = ["Hello <|end|> world\n", "", "Grüße 世"]
FILES = [f"tokens{part}.{ending}" for part in ("", ".short_loss")
         for ending in ("bin", "idx", "json")]  # fmt: skip


def damaged(path: Path, seed: int) -> bytes:
    """What is printed is shown by pytest of what fails."""
    draw = random.Random(f"{path.name} {seed}")
    content = path.read_bytes()
    changed = (
        damaged_json(json.loads(content), draw)
        if path.suffix == ".json"
        else damaged_bytes(content, draw)
    )
    print(f"{path.name}, seed {seed}: {changed[:300]!r}")
    return changed


def use_tokenizer(path: Path, output: Path) -> None:
    tokenizer = load_tokenizer(path)
    for ids in tokenizer.encode_documents(TEXTS):
        tokenizer.decode(ids)
        for id in ids:
            tokenizer.token_text(int(id))
    tokenizer.save_hf(output)


def train_on(prefix: Path) -> None:
    data = DataConfig(train=[], sequence_length=8, index_cache=str(prefix.parent / "cache"))
    source = SequenceSource(str(prefix), data, scores="short_loss", vocab_size=5000)
    source.dataset.check_index()
    source.scores_line()
    for number in range(len(source)):
        source.read(number)
    assert source.sidecar is not None
    source.sidecar.verify()
    source.dataset.verify()


def outcome(use: Callable[[], object]) -> str:
    """Any other exception is the test's failure."""
    try:
        use()
    except InputError as error:
        assert len(str(error)) < 1000
        return "refused"
    return "accepted"


@pytest.mark.parametrize("name", SEEDS)
def test_a_damaged_tokenizer_is_an_input_error_or_harmless(
    name: str, hf_folder: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(hf_folder, tmp_path / "whole"))
    shutil.copy(sentencepiece_model, whole / "tokenizer.model")
    (whole / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|end|>"}}')
    (whole / "config.json").write_text('{"model_type": "llama", "eos_token_id": [1]}')
    folder = Path(shutil.copytree(whole, tmp_path / "folder"))
    if name == "tokenizer.model":  # which beside a tokenizer.json is passed over
        (folder / "tokenizer.json").unlink()
    counts: Counter[str] = Counter()
    for seed in range(SEEDS[name]):
        (folder / name).write_bytes(damaged(whole / name, seed))
        target = folder / name if name == "tokenizer.model" else folder
        counts[outcome(lambda: use_tokenizer(target, tmp_path / "saved"))] += 1  # noqa: B023
    print(name, dict(counts))
    assert counts["refused"] > 0, counts


@pytest.mark.parametrize("name", FILES)
def test_damaged_data_are_an_input_error_or_harmless(name: str, tmp_path: Path) -> None:
    dataset = write_tokens(tmp_path / "tokens", count_up([30, 9, 17]))
    write_sidecar(dataset, [[float("nan")] * 3 + [1.5] * (n - 3) for n in (30, 9, 17)])
    train_on(tmp_path / "tokens")
    path = tmp_path / name
    shutil.copy(path, tmp_path / f"whole{path.suffix}")
    counts: Counter[str] = Counter()
    for seed in range(150):
        path.write_bytes(damaged(tmp_path / f"whole{path.suffix}", seed))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        counts[outcome(lambda: train_on(tmp_path / "tokens"))] += 1
    print(name, dict(counts))
    assert counts["refused"] > 0, counts
    if path.suffix == ".bin":
        assert counts["accepted"] == 0
