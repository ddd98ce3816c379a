"""The best documents become a dataset of their own, with their sidecars, that training reads."""

import json
from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.config.schema import DataConfig
from lctw_megatron.data.sequence_source import SequenceSource
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.inspection.choose_documents import choose_documents
from lctw_megatron.inspection.describe_data import sidecar_names
from lctw_megatron.inspection.rank_documents import rank_documents
from tests.data.small_data import count_up, write_tokens
from tests.evaluation.tiny_run import STRIDE, WINDOW, write_sidecar
from tests.tools.command import call
from tools import inspect_data

LENGTHS = [90, 5, 40, 130, 70, 60]


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    dataset = write_tokens(tmp_path / "all", count_up(LENGTHS))
    for name, scale in (("short_loss", 3.0), ("long_loss", 2.0)):
        write_sidecar(dataset, name, scale)
    return dataset


def choose(dataset: TokenDataset, prefix: Path, keep: float = 0.5) -> str:
    long, short = Sidecar(dataset, "long_loss"), Sidecar(dataset, "short_loss")
    ranking = rank_documents(dataset, long, short, Path(dataset.prefix).parent / "rank.jsonl")
    return choose_documents(ranking, long, short, keep, str(prefix))


def test_the_best_documents_and_their_sidecars_are_copied_bit_for_bit(dataset, tmp_path):
    line = choose(dataset, tmp_path / "half")
    rows = [json.loads(text) for text in (tmp_path / "rank.jsonl").read_text().splitlines()]
    assert len(rows) == 5  # the second document has no scored target
    best = sorted(row["document"] for row in rows[:2])  # ⌊0.5·5⌋, in the order they had
    chosen = TokenDataset(tmp_path / "half")
    chosen.verify()
    assert [chosen[at].tolist() for at in range(len(chosen))] == [dataset[d].tolist() for d in best]
    for name in ("long_loss", "short_loss"):
        new, old = Sidecar(chosen, name), Sidecar(dataset, name)
        new.verify()
        for at, document in enumerate(best):
            np.testing.assert_array_equal(new[at], old[document])
        assert (new.manifest.window, new.manifest.scorer) == (
            old.manifest.window,
            old.manifest.scorer,
        )
    # A window of 16 every 8: the targets after the first window have 8 to 15 tokens before them.
    assert Sidecar(chosen, "short_loss").manifest.min_context == WINDOW - STRIDE
    assert f"half: 2 of 6 documents, {chosen.num_tokens} of 395 tokens" in line
    source = chosen.manifest.source
    assert source["chosen_from"] == dataset.prefix and source["choice"]["keep"] == 0.5
    assert source["choice"]["fingerprint"] == dataset.fingerprint
    assert source["least_gain"] == rows[1]["gain"]


def test_training_reads_it_like_any_other(dataset, tmp_path):
    choose(dataset, tmp_path / "half")
    data = DataConfig(train=[], sequence_length=32)
    source = SequenceSource(str(tmp_path / "half"), data, scores="short_loss", window=WINDOW)
    sample = source.read(0)
    assert np.isfinite(sample.short_loss[WINDOW:]).all()


def test_it_is_made_once_again_after_a_loss_and_anew_for_another_choice(dataset, tmp_path):
    prefix = tmp_path / "chosen"
    assert not choose(dataset, prefix).endswith("(already there)")
    assert choose(dataset, prefix).endswith("(already there)")
    Path(f"{prefix}.short_loss.json").unlink()  # killed before the last manifest
    assert not choose(dataset, prefix).endswith("(already there)")
    assert len(Sidecar(TokenDataset(prefix), "short_loss")) == 2
    manifest = Path(f"{dataset.prefix}.other.json")
    write_sidecar(dataset, "other", 1.0)
    choose(dataset, prefix)
    assert choose(dataset, prefix).endswith("(already there)")
    manifest.write_text(
        json.dumps(json.loads(manifest.read_text()) | {"score_first_window": False})
    )
    assert not choose(dataset, prefix).endswith("(already there)")  # it was scored again
    choose(dataset, prefix, keep=1.0)
    assert len(TokenDataset(prefix)) == 5


def test_a_sidecar_that_was_scored_anew_is_not_replaced(dataset, tmp_path):
    prefix = tmp_path / "chosen"
    choose(dataset, prefix)
    values = Path(f"{prefix}.short_loss.bin")
    write_sidecar(TokenDataset(prefix), "short_loss", 1.0, window=8, scorer={"checkpoint": "new"})
    before = values.read_bytes()
    for keep, loss in ((0.5, "it"), (1.0, "the choice that it belongs to")):
        with pytest.raises(InputError) as raised:
            choose(dataset, prefix, keep)
        assert str(raised.value) == (
            f"{prefix}.short_loss: is no copy (window 8, scored by new), and {loss} would be "
            "replaced; choose another --output-prefix, or remove it"
        )
        assert values.read_bytes() == before and len(TokenDataset(prefix)) == 2
    for end in ("bin", "idx", "json"):
        Path(f"{prefix}.short_loss.{end}").unlink()
    assert not choose(dataset, prefix).endswith("(already there)")
    assert Sidecar(TokenDataset(prefix), "short_loss").manifest.window == WINDOW


def test_another_choice_is_said_to_be_replaced_and_leaves_nothing_behind(dataset, tmp_path, capsys):
    prefix = tmp_path / "chosen"
    choose(dataset, prefix)
    write_sidecar(TokenDataset(prefix), "mine", 1.0)
    assert choose(dataset, prefix).endswith("(already there)")  # which goes on to fit
    with pytest.raises(InputError, match=r"chosen\.mine: is no copy .*, and the choice that it"):
        choose(dataset, prefix, keep=1.0)
    for end in ("bin", "idx", "json"):
        Path(f"{prefix}.mine.{end}").unlink()
    capsys.readouterr()
    choose(dataset, prefix, keep=1.0)
    assert f"{prefix}: was another choice, --keep 0.5, is replaced" in capsys.readouterr().out
    assert sidecar_names(TokenDataset(prefix)) == ["long_loss", "short_loss"]
    # Killed after the tokens came and before the copies did.
    old = Path(f"{prefix}.short_loss.json")
    old.write_text(old.read_text().replace(TokenDataset(prefix).fingerprint, "0" * 32))
    choose(dataset, prefix, keep=1.0)
    assert len(Sidecar(TokenDataset(prefix), "short_loss")) == 5


def test_nothing_else_is_replaced(dataset, tmp_path):
    other = write_tokens(tmp_path / "other", [[1, 2, 3]])
    (tmp_path / "megatron.bin").write_bytes(b"somebody's")
    for prefix, message in (
        (other.prefix, "is no earlier choice"),
        (str(tmp_path / "megatron"), "is no earlier choice"),
        (str(tmp_path / "all.short_loss"), "is no earlier choice"),
        (dataset.prefix, "is the dataset to choose from"),
        (str(tmp_path / "x" / ".." / "all"), "is the dataset to choose from"),
    ):
        with pytest.raises(InputError, match=message):
            choose(dataset, Path(prefix))
    assert TokenDataset(other.prefix)[0].tolist() == [1, 2, 3]
    assert (tmp_path / "megatron.bin").read_bytes() == b"somebody's"


@pytest.mark.parametrize("prefix", ["", "{folder}", "{folder}/", "{folder}/new/"])
def test_a_folder_is_no_prefix(dataset, tmp_path, capsys, monkeypatch, prefix):
    """Its files would be hidden ones."""
    monkeypatch.chdir(tmp_path)
    ranking = tmp_path / "rank.jsonl"
    keep = ("--keep", 0.5, "--output-prefix", prefix.format(folder=tmp_path))
    answer = call(inspect_data.main, capsys, dataset.prefix, "--rank-documents", ranking, *keep)
    assert "--output-prefix" in answer.error_line() and "is " in answer.error_line()
    assert not ranking.exists() and not (tmp_path / ".bin").exists()


def test_the_tool_chooses_what_it_ranks(dataset, tmp_path, capsys):
    ranked = [dataset.prefix, "--rank-documents", tmp_path / "rank.jsonl"]
    answer = call(inspect_data.main, capsys, *ranked, "--keep", 1, "--output-prefix",
                  tmp_path / "best")  # fmt: skip
    assert answer.status == 0 and "best: 5 of 6 documents" in answer.out
    for wrong, message in (
        (["--keep", "0.5"], "go together"),
        (["--keep", "1.5", "--output-prefix", "x"], "share"),
        (["--keep", "nan", "--output-prefix", "x"], "share"),
    ):
        answer = call(inspect_data.main, capsys, *ranked, *wrong)
        assert answer.status == 2 and message in answer.err
    answer = call(inspect_data.main, capsys, dataset.prefix, "--keep", "1", "--output-prefix", "x")
    assert answer.status == 2 and "--keep is for --rank-documents" in answer.err
