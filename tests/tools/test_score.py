"""tools/score.py as a user meets it: help, mistakes, one line each, and the real launchers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scoring.scene import EXTENSIONS, Scene, checkpoint, copy, scene, sidecar_bytes
from tests.tools.command import TOOLS, call, run
from tools import score

__all__ = ["checkpoint", "copy", "scene"]  # fixtures


@pytest.fixture
def ask(capsys):
    """Run the tool with valid arguments but for the given ones (None leaves one out)."""

    def ask(*flags: str, **options: object):
        given = {"data": "no/data", "checkpoint": "no/scorer", "window": 64, "stride": 32}
        given.update({name.replace("_", "-"): value for name, value in options.items()})
        arguments = [
            part
            for name, value in given.items()
            if value is not None
            for part in (f"--{name}", str(value))
        ]
        return call(score.main, capsys, *arguments, *flags)

    return ask


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ([], {"window": "x"}, "argument --window: invalid positive integer value: 'x'"),
        ([], {"stride": 0}, "argument --stride: invalid positive integer value: '0'"),
        ([], {"data": None}, "the following arguments are required: --data"),
        (["--shard", "3/3"], {}, "argument --shard: 3/3: the shards of I/N are 0/3 to 2/3"),
        (["--shard", "0/0"], {}, "argument --shard: 0/0: N, the number of shards, is at least 1"),
        (["--shard", "3"], {}, "argument --shard: invalid I/N value: '3'"),
        (["--shard", "0/3", "--shards", "3"], {}, "not allowed with argument"),
        (["--shard", "0/3", "--merge"], {}, "--merge joins all shards"),
        (["--precision", "fp8"], {}, "argument --precision: invalid choice: 'fp8'"),
    ],
)
def test_a_wrong_argument_is_explained(ask, flags, options, message):
    answer = ask(*flags, **options)
    assert answer.status == 2
    assert message in answer.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no/data.bin: no such file; no/data needs a .bin and an .idx"),
        ({"data": "{prefix}"}, "no/scorer: no complete checkpoint found"),
        ({"data": "{prefix}", "checkpoint": "{scorer}", "window": 500}, "for at most 128 tokens"),
        ({"data": "{prefix}", "checkpoint": "{scorer}", "stride": 65}, "stride 65 > window 64"),
        (
            {"data": "{prefix}", "checkpoint": "{scorer}", "name": "a/b"},
            "--name is 'a/b', expected letters",
        ),
        ({"data": "{prefix}", "checkpoint": "{scorer}", "tensor": 2}, "= 2 ranks, but 1 were"),
        ({"data": "{prefix}.short_loss", "checkpoint": "{scorer}"}, "holds float32 values, tokens"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(ask, scene: Scene, options, message):
    names = {"prefix": scene.prefix, "scorer": scene.checkpoint}
    before = sorted(os.listdir(scene.folder))
    if "tensor" in options:
        options["name"] = "tensor"  # short_loss is finished
        answer = run("score.py", *arguments_of(options, names))
        assert message in answer.err.splitlines()[-1]
        assert answer.status == 2
    else:
        filled = {key: str(value).format(**names) for key, value in options.items()}
        assert message in ask(**filled).error_line()
    assert sorted(os.listdir(scene.folder)) == before


def arguments_of(options, names) -> list[str]:
    given = {"window": 64, "stride": 32, **options}
    return [
        part for name, value in given.items() for part in (f"--{name}", str(value).format(**names))
    ]


def test_the_command_scores_and_says_what_it_did(copy: Scene, scene: Scene):
    answer = run("score.py", *copy.arguments)
    assert answer.status == 0, answer.err
    assert sidecar_bytes(copy.prefix) == scene.reference
    machine, plan, result = answer.out.splitlines()
    assert machine.startswith("lctw-megatron ") and machine.endswith("scoring in fp32")
    assert "tokens of context" in plan and "0 of 4 shards finished before" in plan
    assert "tokens scored, mean " in result and result.endswith(" nats")
    assert "tokens/s" in answer.err and "elapsed" in answer.err


def test_other_settings_need_another_name_or_overwrite(ask, copy: Scene, scene: Scene):
    for end in EXTENSIONS:
        Path(f"{copy.prefix}.short_loss{end}").write_bytes(scene.reference[end])
    answer = ask(data=copy.prefix, checkpoint=copy.checkpoint, window=48)
    line = answer.error_line()
    assert "corpus.short_loss.json: made with window 64, but window 48 is asked for" in line
    assert "--name" in line and "--overwrite" in line
    # Who launched a recipe has neither option.
    assert "(in a recipe scoring.name and data.scores)" in line
    assert line.endswith(f"(in a recipe remove {copy.prefix}.short_loss.json and launch again)")
    assert sidecar_bytes(copy.prefix) == scene.reference


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--shard", "0/1"], ["--merge"]])
def test_a_corpus_that_has_the_sidecar_s_name_is_never_replaced(ask, copy: Scene, flags):
    others = [Path(f"{copy.prefix}.en{end}") for end in EXTENSIONS]
    for path in others:
        path.write_bytes(copy.prefix.with_suffix(path.suffix).read_bytes())
    for path in (None, others[2]):  # then without a manifest: another tool's corpus
        if path is not None:
            path.unlink()
        before = {path.name: path.read_bytes() for path in copy.folder.iterdir()}
        line = ask(*flags, data=copy.prefix, checkpoint=copy.checkpoint, name="en").error_line()
        assert f"--name en: {copy.prefix}.en.bin holds tokens, no sidecar; choose another" in line
        assert {path.name: path.read_bytes() for path in copy.folder.iterdir()} == before


@pytest.mark.long
def test_torchrun_and_its_restarts_change_no_byte(copy: Scene, scene: Scene, tmp_path: Path):
    # One rank kills itself after its first shard, once: torchrun starts all of them again.
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(TOOLS.parent)!r})\n"
        "from lctw_megatron.cli import run_command\n"
        "from lctw_megatron.scoring import score_corpus\n"
        "from tools.score import main\n"
        "write, flag = score_corpus.write_shard, sys.argv.pop(1)\n"
        "def write_and_die(*arguments):\n"
        "    write(*arguments)\n"
        "    if os.environ['RANK'] == '1' and not os.path.exists(flag):\n"
        "        open(flag, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "score_corpus.write_shard = write_and_die\n"
        "run_command(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--standalone", str(dying), str(tmp_path / "flag")]
    # A shared store gives restarted ranks the addresses of the dead: pytorch/pytorch#135712.
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [*command, *copy.arguments, "--shards", "6"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flag").exists()
    assert done.stdout.count("shards finished before") == 2  # started twice
    assert sidecar_bytes(copy.prefix) == scene.reference
