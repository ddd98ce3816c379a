"""The house keeps its order: what lies where, what imports what, what every command answers."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import lctw_megatron

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lctw_megatron"
TOOLS = sorted((ROOT / "tools").glob("*.py"))

TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "recipes",
    "lctw_megatron",
    "tools",
    "configs",
    "tests",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "Dockerfile",
}

# Part of the package -> the parts it may import (besides itself). Arrows point one way: every part
# imports parts that stand above it here, so there is no circle.
_EVERYWHERE = {
    "errors",
    "atomic",
    "closing",
    "progress",
    "ownership",
    "squeue",
    "work_folder",
    "end_with_parent",
}
_LOW = {"config", "data"} | _EVERYWHERE
_MIDDLE = {"scoring", "weighting", "model", "platform"} | _LOW
_HIGH = {"training", "evaluation", "conversion"} | _MIDDLE
MAY_IMPORT = {
    "config": _EVERYWHERE,
    "data": {"config"} | _EVERYWHERE,
    "platform": {"config"} | _EVERYWHERE,
    "weighting": _LOW,
    "model": {"platform"} | _LOW,
    "scoring": {"model", "platform"} | _LOW,
    "evaluation": _MIDDLE,
    "training": {"evaluation"} | _MIDDLE,
    "conversion": _MIDDLE,
    "plugin": {"weighting"} | _LOW,
    "launch": {"training", "evaluation", "conversion", "weighting", "model", "scoring"} | _LOW,
    "report": {"training", "evaluation"} | _LOW,
    "inspection": {"report", "evaluation", "scoring", "weighting", "model"} | _LOW,
    "benchmarks": _HIGH,
    "commands": {"launch", "report", "inspection", "benchmarks", "cli"} | _HIGH,
}

# Nothing below may need a GPU library or megatron-core: preprocessing and the maths run anywhere.
WITHOUT_MEGATRON = ["config", "data", "weighting", "launch", "scoring/windows.py"]
GPU_LIBRARIES = {"megatron", "transformer_engine", "apex"}


def project_files() -> list[str]:
    """Every file that is part of the project: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all modules that ``path`` imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_top_level_holds_what_a_newcomer_expects_and_nothing_else():
    found = {name.split("/")[0] for name in project_files()}
    visible = {name for name in found if not name.startswith(".")}
    assert visible <= TOP_LEVEL, f"not at the top level: {visible - TOP_LEVEL}"
    assert visible >= TOP_LEVEL - {"recipes", "tools"}, f"missing: {TOP_LEVEL - visible}"


def test_a_file_is_one_idea():
    for name in project_files():
        path = ROOT / name
        assert path.name != "utils.py", f"{name}: name the file after its idea"
        if path.suffix == ".py":
            text = path.read_text()
            lines = len(text.splitlines())
            assert lines <= 600, f"{name} has {lines} lines; 300 is a room, 600 a hall"
            reason = "Longer than 350 lines" in (ast.get_docstring(ast.parse(text)) or "")
            assert lines <= 350 or reason, f"{name} has {lines} lines and does not say why"
            assert lines > 350 or not reason, f"{name} excuses a length that it has not"


def test_no_file_knows_the_machine_it_was_written_on():
    homes = re.compile("/(?:" + "root|home" + r")/\w")
    for name in project_files():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".sbatch", ".sh", ""}:
            found = homes.search(path.read_text(errors="ignore"))
            assert not found, f"{name}: {found and found.group()}"


def test_arrows_between_the_parts_point_one_way():
    for part, allowed in MAY_IMPORT.items():
        for path in (PACKAGE / part).rglob("*.py"):
            for module in imported_modules(path):
                names = module.split(".")
                assert names[0] not in {"tools", "tests"}, f"{path} imports {module}"
                if names[0] == "lctw_megatron" and len(names) > 1:
                    assert names[1] in allowed | {part}, f"{path} imports {module}"


def test_every_part_of_the_package_has_its_place_in_the_order():
    parts = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert parts == set(MAY_IMPORT)
    above = _EVERYWHERE | {"cli"}
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{part} may import {allowed - above}: a circle"
        above.add(part)


def test_nothing_imports_preprocessing_but_its_command_what_measures_it_and_what_launches_it():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts
        if part[:2] == ("data", "preprocessing") or part[0] in ("commands", "benchmarks"):
            continue
        if part != ("launch", "stage_graph.py"):  # asks it whether a dataset is of its corpus still
            for module in imported_modules(path):
                assert not module.startswith("lctw_megatron.data.preprocessing"), path


@pytest.mark.parametrize("part", WITHOUT_MEGATRON)
def test_data_and_maths_need_no_megatron(part):
    paths = [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py"))
    assert paths
    for path in paths:
        for module in imported_modules(path):
            assert module.split(".")[0] not in GPU_LIBRARIES, f"{path} imports {module}"


def test_the_readme_and_the_makefile_agree():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert targets >= {"quickstart", "test", "test-all", "test-next", "lint"}
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^\$? ?make ([a-z-]+)|`make ([a-z-]+)`", readme, re.MULTILINE))
    named = {first or second for first, second in named}
    assert named <= targets, f"README names make targets that do not exist: {named - targets}"
    described = set(re.findall(r"^#   make ([a-z-]+)", makefile, re.MULTILINE))
    assert described == targets - {"help"}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_no_tool_takes_the_name_of_a_module(tool):
    # Python puts tools/ first on the path: tools/inspect.py would break every import of inspect.
    assert tool.stem not in sys.stdlib_module_names
    assert importlib.util.find_spec(tool.stem) is None


def test_every_tool_explains_itself():
    def answer(tool: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        command = [sys.executable, str(tool), "--help"]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
        )

    with ThreadPoolExecutor(2) as pool:
        for tool, result in zip(TOOLS, pool.map(answer, TOOLS), strict=True):
            assert result.returncode == 0, f"{tool.name} --help: {result.stderr}"
            assert result.stdout.startswith("usage: "), tool.name
            for option in ("--debug", "--version"):
                assert option in result.stdout, f"{tool.name} --help does not mention {option}"


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lctw_megatron.__version__
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Helm", "Daheim", "Gurevych"]
    assert paper["url"] in (ROOT / "README.md").read_text()
