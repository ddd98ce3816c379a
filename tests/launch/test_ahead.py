"""What a late stage would refuse is said before the first, where it can be known."""

from pathlib import Path

import numpy as np
import pytest

from lctw_megatron.data.token_dataset import TokenWriter
from lctw_megatron.data.tokenizers import load_tokenizer
from lctw_megatron.errors import InputError
from lctw_megatron.launch import local
from tests.launch.conftest import RECIPE
from tests.tokenizer_files import hf_folder

__all__ = ["hf_folder"]

SINGLE = RECIPE.replace("layout: {tensor: 2, sequence: true}", "layout: single")


def check(plan, *changes: str) -> None:
    made = plan(SINGLE, *changes)
    local.check_needs(made, made.stages)


def write(prefix: str, tokens: int, model: Path) -> None:
    with TokenWriter(prefix, load_tokenizer(model).identity) as writer:
        writer.add(np.full(tokens, 5))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ("[old, nowhere]", "evaluation.compare_with: nowhere: no such run folder"),
        ("[old, empty]", "evaluation.compare_with: empty: holds neither steps"),
        ("[out/dense]", "evaluation.compare_with: out/dense is in the report already"),
        ("[old, ./old]", r"evaluation.compare_with: \./old is in the report already"),
    ],
)
def test_what_is_no_run_to_compare_with_is_refused(plan, folders, message):
    for name in ("old", "empty"):
        Path(name).mkdir()
    Path("old/metrics.jsonl").touch()
    with pytest.raises(InputError, match=message):
        check(plan, f"evaluation.compare_with={folders}")


def test_a_run_that_the_chain_itself_trains_may_be_compared_with(plan):
    Path("old").mkdir()
    Path("old/evaluation.json").touch()
    check(plan, "evaluation.compare_with=[old, out/base]")


def test_held_out_text_that_is_too_short_is_refused(plan, sentencepiece_model):
    write("held", 1024, sentencepiece_model)
    message = "evaluation.data of run uniform: held: the longest document has 1024 tokens, but"
    with pytest.raises(InputError, match=message):
        check(plan, "evaluation.data=held")
    check(plan, "evaluation.data=held", "evaluation.sequence_length=1023")


def test_held_out_text_that_prepare_does_not_hold_out_must_be_there(plan, sentencepiece_model):
    none = "prepare.validation_documents=0", "data.validation=[]"
    message = "evaluate-uniform reads data/books-validation, which is neither"
    with pytest.raises(InputError, match=message):
        check(plan, *none)
    Path("data").mkdir()
    write("data/books-validation", 2000, sentencepiece_model)
    check(plan, *none)


GIVEN = (
    "data={train: given, sequence_length: 256}",
    "evaluation.data=held",
    "scoring=null",
    "runs.dense.weighting=uniform",
)


def test_held_out_text_of_another_tokenizer_is_refused(plan, sentencepiece_model, hf_folder):
    write("given", 2000, sentencepiece_model)
    write("held", 2000, hf_folder)
    message = "evaluation.data of run uniform: held was tokenised with .*, but the tokenizer of run"
    with pytest.raises(InputError, match=message):
        check(plan, *GIVEN)
    write("held", 2000, sentencepiece_model)
    check(plan, *GIVEN)
    known = load_tokenizer(sentencepiece_model).identity
    with TokenWriter("held", known.model_copy(update={"add_bos": not known.add_bos})) as writer:
        writer.add(np.full(2000, 5))
    message = "evaluation.data of run uniform: held: its documents begin with"
    with pytest.raises(InputError, match=message):
        check(plan, *GIVEN)


def test_held_out_text_is_asked_of_the_tokenizer_that_prepare_names(
    plan, sentencepiece_model, hf_folder
):
    write("held", 2000, hf_folder)
    names = KNOWN, f"prepare.tokenizer={sentencepiece_model}", "evaluation.data=held"
    message = "evaluation.data of run uniform: held was tokenised with"
    with pytest.raises(InputError, match=message):
        check(plan, *names)


def test_a_run_that_begins_with_another_model_or_tokenizer_is_refused(
    plan, sentencepiece_model, hf_folder
):
    with pytest.raises(InputError, match="run uniform: model.num_layers is 2, but run base has 4"):
        check(plan, "runs.uniform.model.num_layers=2")
    write("given", 2000, sentencepiece_model)
    write("other", 2000, hf_folder)
    write("held", 2000, sentencepiece_model)
    message = "run uniform: given was tokenised with .*, but the tokenizer of run base is"
    with pytest.raises(InputError, match=message):
        check(plan, *GIVEN, "runs.base.data.train=other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["scoring.window=512"], "scoring.window is 512, but it is made for at most 256 tokens"),
        (["scoring.tensor=3"], "scoring.scorer run base: model.num_attention_heads"),
        (
            ["runs.base.data.train=other", "runs.uniform.start=null", "runs.dense.start=null"],
            "scoring.scorer run base: given was tokenised with .*, but the tokenizer of run base",
        ),
    ],
)
def test_a_scorer_that_would_be_trained_for_nothing_is_refused(
    plan, sentencepiece_model, hf_folder, changes, message
):
    write("given", 2000, sentencepiece_model)
    write("other", 2000, hf_folder)
    with pytest.raises(InputError, match=message):
        check(plan, "data.train=given", "data.validation=[]", "evaluation=null", *changes)


KNOWN = "prepare.train_sentencepiece=null"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "evaluation.recall={lengths: [4096, 16]}",
            "evaluation.recall of run uniform: a length of 16 tokens: a sample of task",
        ),
        (
            "evaluation.recall={lengths: [4096], window: 8, tasks: [one_key]}",
            "evaluation.recall of run uniform: --window 8: the question and answers",
        ),
        (
            "evaluation.recall={lengths: [4096], tasks: [one_key], haystack: held}",
            "evaluation.recall of run uniform: --haystack held: its longest document has",
        ),
        (
            "runs.dense.training.recall={lengths: [16], every: 5}",
            "training.recall of run dense: a length of 16 tokens",
        ),
    ],
)
def test_recall_that_does_not_suit_the_tokenizer_is_refused(
    plan, sentencepiece_model, change, message
):
    """That of the prepare section, or of data that is there."""
    write("held", 100, sentencepiece_model)
    with pytest.raises(InputError, match=message):
        check(plan, KNOWN, f"prepare.tokenizer={sentencepiece_model}", change)
    write("given", 100, sentencepiece_model)
    ready = "data.train=given", "data.validation=[given]", "scoring=null", "data.scores=theirs"
    write("given.theirs", 100, sentencepiece_model)
    with pytest.raises(InputError, match=message):
        check(plan, *ready, change)
    check(plan, change)  # prepare makes the tokenizer, so nobody knows yet


def test_what_only_prepare_lets_know_is_said_right_after_it(plan, sentencepiece_model, monkeypatch):
    made = plan(SINGLE, "evaluation.recall={lengths: [16]}")
    ran = []

    def run(command: list[str]) -> int:
        ran.append(command)
        Path("data").mkdir(exist_ok=True)
        for prefix in ("data/books", "data/books-validation"):
            write(prefix, 2000, sentencepiece_model)
        return 0

    monkeypatch.setattr(local, "_run", run)
    monkeypatch.setattr(type(made), "_of_another_corpus", lambda *arguments: False)
    with pytest.raises(InputError, match="evaluation.recall of run uniform: a length of 16 tokens"):
        local.run_stages(made, made.stages)
    assert len(ran) == 1
