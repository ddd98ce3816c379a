"""A dataset that was made of another corpus than lies there now is made again, and all after it."""

import os
from pathlib import Path

import pytest

from lctw_megatron.data.preprocessing.preprocess import preprocess
from lctw_megatron.errors import InputError
from lctw_megatron.launch import local
from lctw_megatron.launch.stage_graph import build_stage_graph
from tests.launch.conftest import RECIPE
from tests.launch.test_stage_graph import done, mark_done


@pytest.fixture
def prepared(plan, sentencepiece_model):
    """Makes a plan of everything done, of a corpus of two files in one folder and one beside it."""
    for path in ("corpus/a.txt", "corpus/b.txt", "more.txt"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(f"The text of {path} is short.\n" * 20)
    recipe = RECIPE.replace("[corpus/*.jsonl.gz, more texts]", "[corpus, more.txt]")
    tokenizer = f"tokenizer: {os.path.abspath('small.model')}"
    Path("small.model").write_bytes(sentencepiece_model.read_bytes())
    text = recipe.replace("train_sentencepiece: 4096", tokenizer)
    made = plan(text.replace("validation_documents: 8", "validation_documents: 1"))
    assert made.recipe.prepare is not None
    preprocess(made.recipe.prepare)
    mark_done(made, *(s.name for s in made.stages))
    return lambda: build_stage_graph("recipe.yaml")


def edit(path: str) -> None:
    with open(path, "a") as file:
        file.write("One line more.\n")


CHANGES = {
    "edited": lambda: edit("corpus/a.txt"),
    "same size": lambda: os.utime("more.txt", (1, 1)),
    "added": lambda: edit("corpus/c.txt"),
    "removed": lambda: os.unlink("corpus/b.txt"),
    "an input removed": lambda: os.unlink("more.txt"),
    "emptied": lambda: [os.unlink(f"corpus/{name}") for name in os.listdir("corpus")],
    "another tokenizer": lambda: Path("small.model").write_bytes(
        Path("small.model").read_bytes().replace(b"self", b"flse")
    ),
    "a broken tokenizer": lambda: Path("small.model").write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_corpus_is_prepared_again_and_all_after_it(prepared, change):
    made = prepared()
    assert done(made) == [s.name for s in made.stages]
    CHANGES[change]()
    made = prepared()
    assert not made.is_done(made.stages[0])
    assert made.outdated(made.stages) == {s.name for s in made.stages[1:]}
    lines = local.command_lines(made, made.stages)
    assert not [line for line in lines if "done before" in line]
    made.mark(made.stages[1]).unlink()
    with pytest.raises(InputError, match="needs prepare, which is done, but its corpus, tok"):
        local.check_needs(made, made.select(["train-base"]))


def test_what_is_not_there_any_more_has_not_changed(prepared):
    os.unlink("more.txt")
    Path("corpus").rename("elsewhere")
    made = prepared()
    assert done(made) == [s.name for s in made.stages]


def test_a_dataset_that_was_made_again_by_hand_is_noticed(prepared):
    edit("corpus/a.txt")
    made = prepared()
    preprocess(made.recipe.prepare)
    later = made.mark(made.stages[0]).stat().st_mtime + 3600
    os.utime("data/books.json", (later, later))
    assert not made.is_done(made.stages[0])
    made.set_done(made.stages[0])
    os.utime(made.mark(made.stages[0]), (later, later))
    assert made.is_done(made.stages[0])
