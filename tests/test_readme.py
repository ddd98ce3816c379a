"""What the READMEs tell the reader to type: every option exists, every Python line runs."""

import argparse
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lctw_megatron.config.shipped import find_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("recipes/*/README.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The page's code of a language, its indentation inside a list taken away."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.M | re.S)
    return [re.sub(f"^{indent}", "", code, flags=re.M) for indent, code in found]


def commands(page: Path) -> list[list[str]]:
    """The words of every command line."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def program(words: list[str]) -> tuple[Callable[[list[str]], object], list[str]]:
    """The `main` that a command line starts, and the arguments it gets."""
    if words[0].startswith("lctw-"):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        module, _, _ = project["scripts"][words[0]].partition(":")
        return importlib.import_module(module).main, words[1:]
    assert words[0] in ("python", "torchrun"), words
    tool = next(place for place, word in enumerate(words) if word.endswith(".py"))
    specification = importlib.util.spec_from_file_location("tool", ROOT / words[tool])
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main, words[tool + 1 :]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_command_is_one_that_its_tool_takes(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    found = commands(page)
    assert len(found) >= 2
    for words in found:
        if words[0] == "make":  # tests/test_house.py
            continue
        if words == ["python", "-m", "lctw_megatron"]:  # tests/platform/test_capabilities.py
            continue
        if words[0] == "pip":
            assert words == ["pip", "install", "."], words
            continue
        main, arguments = program(words)
        with pytest.raises(Parsed):
            main(arguments)
        for recipe in (word for word in words if word.startswith("recipes/")):
            assert list(ROOT.glob(recipe)), recipe


def test_the_names_of_shipped_recipes_are_right():
    named = [words for page in PAGES for words in commands(page) if words[0].startswith("lctw-")]
    assert named
    for words in named:
        assert words[0] in ("lctw-launch", "lctw-train"), words
        assert find_recipe(words[1]) == ROOT / "recipes" / words[1] / "recipe.yaml"


def test_the_python_lines_run():
    in_python, in_another_run = blocks(ROOT / "README.md", "python")
    names = {"long_loss": torch.rand(2, 8), "short_loss": torch.rand(2, 8)}
    exec(in_python, names)
    assert names["weights"].shape == (2, 8) and names["weights"].dtype == torch.float32
    names = {"forward_step": lambda data_iterator, model: None}
    exec(in_another_run, names)
    assert callable(names["forward_step"]) and names["GPTDataset"].__name__ == "ShortLossGPTDataset"
