"""The wheel: what is in it, and that it does its work in an environment without a checkout."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from lctw_megatron import __version__

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "lctw_megatron", "configs", "recipes")
COMMANDS = sorted(
    path.stem for path in (ROOT / "lctw_megatron/commands").glob("*.py") if path.stem != "__init__"
)


def script(command: str) -> str:
    return f"lctw-{command.replace('_', '-')}"


def without_checkout(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | changes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
            continue
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet"]
    if setuptools_version() >= 77:  # else pip fetches what pyproject.toml asks for
        command.append("--no-build-isolation")
    built = subprocess.run(
        [*command, "--wheel-dir", str(folder)],
        capture_output=True,
        text=True,
        env=without_checkout(PIP_DISABLE_PIP_VERSION_CHECK="1"),
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def setuptools_version() -> int:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


def files_of(folder: str) -> set[str]:
    """Files of the checkout below ``folder``, by their paths in it."""
    paths = (path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}


def test_the_wheel_holds_the_package_the_configs_and_the_recipes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        modules = files_of("lctw_megatron")
        assert {"lctw_megatron/py.typed", "lctw_megatron/launch/job.sbatch.j2"} <= modules
        # The work of a recipe, beside it, stays in the checkout.
        left = ("/sbatch/", "/results/")
        recipes = {n for n in files_of("recipes") if not any(part in n for part in left)}
        assert "recipes/quickstart/recipe.yaml" in recipes
        assert names == modules | {f"lctw_megatron/{n}" for n in recipes | files_of("configs")}
        for name in recipes | files_of("configs"):
            assert archive.read(f"lctw_megatron/{name}") == (ROOT / name).read_bytes()


def test_every_command_is_a_console_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entries,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        parser = ConfigParser()
        parser.read_string(archive.read(entries).decode())
    expected = {script(name): f"lctw_megatron.commands.{name}:run" for name in COMMANDS}
    assert dict(parser["console_scripts"]) == expected
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == set(COMMANDS)


def test_the_image_is_built_from_the_same_files() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied == list(BUILT_FROM)


class Installed:
    """An environment with the wheel, which finds the libraries where these tests do."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.environment = folder / "environment"
        make = [sys.executable, "-m", "venv", "--without-pip", str(self.environment)]
        subprocess.run(make, check=True)
        self.python = self.environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
        (self.site,) = self.environment.glob("lib/python*/site-packages")
        # A folder named in a .pth file is searched, but no .pth file in it is read: not the one of
        # an editable install either.
        libraries = [path for path in sys.path if Path(path).name.endswith("-packages")]
        (self.site / "libraries.pth").write_text("\n".join(libraries))
        torchrun = self.environment / "bin" / "torchrun"  # torch's own, were it installed here
        torchrun.write_text('#!/bin/sh\nexec python -m torch.distributed.run "$@"\n')
        torchrun.chmod(0o755)

    def run(self, where: Path, *command: object, **changes: str) -> subprocess.CompletedProcess:
        path = f"{self.environment / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [str(part) for part in command],
            cwd=where,
            capture_output=True,
            text=True,
            timeout=600,
            env=without_checkout(PATH=path, OMP_NUM_THREADS="1", **changes),
        )

    def good(self, where: Path, *command: object) -> str:
        """What a command prints that ends well."""
        result = self.run(where, *command)
        assert result.returncode == 0, f"{command}: {result.stderr[-3000:]}"
        return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_what_is_imported_is_what_was_installed(installed: Installed, tmp_path: Path) -> None:
    where = "import lctw_megatron; print(lctw_megatron.__file__)"
    found = installed.good(tmp_path, installed.python, "-c", where).strip()
    assert Path(found).parent == installed.site / "lctw_megatron"


@pytest.mark.parametrize("command", COMMANDS)
def test_version_is_told_at_once(installed: Installed, tmp_path: Path, command: str) -> None:
    tool = [installed.python, ROOT / "tools" / f"{command}.py"]
    for words in ([script(command)], tool):
        answer = installed.run(tmp_path, *words, "--version", PYTHONPROFILEIMPORTTIME="1")
        assert (answer.returncode, answer.stdout) == (0, f"lctw-megatron {__version__}\n")
        imported = {line.split("|")[-1].strip() for line in answer.stderr.splitlines()}
        assert "lctw_megatron.cli" in imported and "torch" not in imported


def test_shipped_recipes_and_fragments_are_found(installed: Installed, tmp_path: Path) -> None:
    answer = installed.run(tmp_path, "lctw-train", "quick")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.endswith("did you mean quickstart?\n")
    out = installed.good(tmp_path, "lctw-train", "quickstart", "--run", "dense", "--dry-run")
    assert "run_dir: runs/quickstart/dense" in out and "interpolation: 0.75" in out
    (tmp_path / "quickstart").write_text("name: mine\n")  # a file of that name comes first
    answer = installed.run(tmp_path, "lctw-train", "quickstart", "--dry-run")
    assert answer.returncode == 2 and answer.stderr.startswith("error: quickstart: ")


def test_launch_needs_no_checkout_and_a_tool_uses_its_own(
    installed: Installed, tmp_path: Path
) -> None:
    train, report = "commands.train quickstart", "commands.report runs/quickstart/"
    out = installed.good(tmp_path, "lctw-launch", "quickstart", "--dry-run")
    assert f"python -m lctw_megatron.{train} --run dense\n" in out and "tools/" not in out
    assert f"python -m lctw_megatron.{report}" in out
    slurm = ("--cluster", "slurm_cpu_test")
    out = installed.good(tmp_path, "lctw-launch", "quickstart", *slurm, "--dry-run")
    assert f"    lctw_megatron.{train}\n" in out and " tools/train.py" not in out
    assert "' rank python -m " in out and " torchrun --standalone --nproc-per-node=2 -m -- " in out
    assert f"\npython -m lctw_megatron.{report}" in out
    launch = ROOT / "tools" / "launch.py"
    out = installed.good(tmp_path, installed.python, launch, "quickstart", "--dry-run")
    assert "python tools/train.py quickstart --run dense\n" in out


RECIPE = """\
name: tiny
output_dir: out
prepare:
  inputs: [texts]
  output_prefix: data/tiny
  train_sentencepiece: 300
  validation_documents: 2
  workers: 1
model: {base: tiny_llama, num_layers: 1, hidden_size: 32, ffn_hidden_size: 64}
layout: single
data: {train: data/tiny, validation: data/tiny-validation, sequence_length: 128}
training: {steps: 2, global_batch_size: 2, micro_batch_size: 1}
runs:
  base: {data: {sequence_length: 32}}
  dense: {start: base, weighting: dense}
scoring: {scorer: base, window: 32, stride: 24}
evaluation: {data: data/tiny-validation, sequence_length: 128, max_sequences: 2, window: 32}
cluster: {base: slurm_cpu_test, nodes: 1}
"""


def tiny_folder(folder: Path) -> Path:
    (folder / "texts").mkdir(parents=True)
    for number in range(8):
        words = " ".join(f"{word} times {number} is {word * number}." for word in range(300))
        (folder / "texts" / f"{number}.txt").write_text(words)
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_console_scripts_go_from_text_to_report(installed: Installed, tmp_path: Path) -> None:
    here = tiny_folder(tmp_path / "somewhere")
    data, base, dense = "data/tiny", "out/base", "out/dense"
    text = ("--input", "texts", "--output-prefix", data, "--validation-documents", 2)
    held_out = ("--data", f"{data}-validation", "--sequence-length", 128, "--window", 32)
    for command in (
        ("lctw-preprocess", *text, "--train-sentencepiece", 300),
        ("lctw-train", "tiny.yaml", "--run", "base"),
        ("lctw-score", "--data", data, "--checkpoint", base, "--window", 32, "--stride", 24),
        ("lctw-train", "tiny.yaml", "--run", "dense"),
        ("lctw-convert", "export", "--checkpoint", dense, "--output", f"{dense}/hf"),
        ("lctw-convert", "verify", "--checkpoint", dense, "--hf", f"{dense}/hf", "--length", 64),
        ("lctw-evaluate-model", "losses", "--checkpoint", dense, *held_out),
        ("lctw-report", dense),
        ("lctw-inspect-data", data, "--verify"),
    ):
        installed.good(here, *command)
    assert (here / dense / "hf" / "config.json").is_file()
    assert (here / "out" / "report" / "report.html").is_file()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_launch_runs_all_stages_here_and_by_batch_scripts(
    installed: Installed, tmp_path: Path
) -> None:
    here = tiny_folder(tmp_path / "somewhere else")
    installed.good(here, "lctw-launch", "tiny.yaml", "--stages", "prepare", "train-base", "score")
    # A script of the cluster, which activates .venv, run without SLURM: on two ranks by torchrun.
    (here / ".venv").symlink_to(installed.environment)
    slurm = ("--cluster", "slurm", "--stages", "train-dense", "--dry-run")
    printed = installed.good(here, "lctw-launch", "tiny.yaml", *slurm)
    _, script, _ = re.split(r"^##### .*\n\n", printed, flags=re.MULTILINE)  # and submit.sh
    (here / "train.sbatch").write_text(script)
    installed.good(here, "bash", "train.sbatch")
    assert len((here / "out/dense/metrics.jsonl").read_text().splitlines()) == 2
    out = installed.good(here, "lctw-launch", "tiny.yaml")
    assert "train-dense: done before" in out and "report: done in" in out
    assert (here / "out/report/report.html").is_file()
    assert installed.good(here, "lctw-launch", "status", "out").count(" done") == 7
