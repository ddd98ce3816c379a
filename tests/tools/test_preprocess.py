"""tools/preprocess.py as a user meets it: mistakes, interruptions, a full disk."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from lctw_megatron.data import TokenDataset
from tests.data.corpus_files import texts, write_corpus
from tests.tools.command import call, run, start
from tools import preprocess

RESULT = (".bin", ".idx", ".json")


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "in" / "corpus.jsonl", texts(20))


@pytest.fixture
def prefix(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "corpus"


@pytest.fixture
def ask(capsys, corpus, prefix, sentencepiece_model):
    """Run the tool with valid arguments but for the given ones (None leaves one out)."""

    def ask(*flags, **options):
        given = {"input": corpus, "output-prefix": prefix, "tokenizer": sentencepiece_model}
        given.update({name.replace("_", "-"): value for name, value in options.items()})
        arguments = [
            part
            for name, value in given.items()
            if value is not None
            for part in (f"--{name}", value)
        ]
        return call(preprocess.main, capsys, *arguments, *flags)

    return ask


def test_the_tool_does_what_it_says(ask, prefix):
    answer = ask("--workers", "1", validation_documents=2)
    assert answer.status == 0
    assert "18 documents" in answer.out and "2 more documents held out" in answer.out
    assert "tokenise: " in answer.err and "documents/s" in answer.err and "tokens/s" in answer.err
    assert len(TokenDataset(prefix)) == 18
    assert "already there" in ask(validation_documents=2).out


def lines(path, *contents):
    path.write_bytes(b"".join(content + b"\n" for content in contents))


GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    "content, options, message",
    [
        ([], {}, "input {corpus}: an empty file; there is no text to tokenise"),
        ([b"", b" "], {}, "the corpus holds no text: 0 documents are broken and 0 empty"),
        ([GOOD, b"", b'{"text": 1'], {}, "{corpus} line 3: not valid JSON"),
        ([GOOD, b'{"body": "x"}'], {}, "{corpus} line 2: no field 'text' (fields: body)"),
        ([GOOD], {"text_field": "body"}, "{corpus} line 1: no field 'body' (fields: text)"),
        ([b'{"text": 1}'], {}, "{corpus} line 1: field 'text' is int, a string was expected"),
        ([GOOD, b"\xff"], {}, "{corpus} line 2: not valid UTF-8"),
        ([GOOD], {"input": "none.jsonl"}, "input none.jsonl: no such file or folder"),
        ([GOOD], {"input": "a.csv*"}, "input a.csv*: no such file or folder, and no glob"),
        ([GOOD], {"tokenizer": "gone"}, "gone: no such file or folder; give a SentencePiece"),
        ([GOOD], {"tokenizer": "{corpus}"}, "is a file that does not end in .model"),
        ([GOOD], {"output_prefix": "{folder}"}, "--output-prefix {folder}: is a folder"),
        ([GOOD], {"output_prefix": "{corpus}/x"}, "a file, a folder was expected"),
        ([GOOD], {"max_bytes": 1}, "--max-bytes 1: the first document alone is larger"),
        ([GOOD, GOOD], {"validation_documents": 2}, "the corpus has 2 documents, so none would"),
        (
            [GOOD],
            {"tokenizer": None, "train_sentencepiece": 50},
            "--train-sentencepiece 50: training failed (Vocabulary size",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(ask, corpus, prefix, content, options, message):
    def fill(value):
        names = {"corpus": corpus, "folder": prefix.parent}
        return value.format(**names) if isinstance(value, str) else value

    lines(corpus, *content)
    answer = ask(**{name: fill(value) for name, value in options.items()})
    assert fill(message) in answer.error_line()
    assert os.listdir(prefix.parent) == []
    assert os.listdir(corpus.parent) == ["corpus.jsonl"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workers", "0"], "argument --workers: invalid positive integer value: '0'"),
        (["--max-bytes", "x"], "argument --max-bytes: invalid positive integer value: 'x'"),
        (["--validation-documents", "-1"], "--validation-documents: a number from 0 on"),
        (["--train-sentencepiece", "300"], "not allowed with argument --tokenizer"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_wrong_flag_is_named(ask, prefix, flags, message):
    answer = ask(*flags)
    assert answer.status == 2
    assert message in answer.err
    assert os.listdir(prefix.parent) == []


def test_skip_bad_counts_what_it_leaves_out(ask, corpus, prefix):
    lines(corpus, GOOD, b"{", b'{"body": 1}', b'{"text": ""}', GOOD)
    answer = ask("--skip-bad")
    assert answer.status == 0
    assert "2 documents" in answer.out and "2 skipped, 1 empty" in answer.out
    source = TokenDataset(prefix).manifest.source
    assert (source["skipped"], source["empty"]) == (2, 1)


@pytest.fixture
def large(tmp_path) -> Path:
    """3 MB in 12 shards: enough to be interrupted in."""
    text = "".join(texts(100))
    many = [f"{number} {text[: 2000 + number % 1000]}" for number in range(950)]
    return write_corpus(tmp_path / "in" / "large.jsonl", many)


def wait_for_shards(process, work, count):
    """Until so many shards are finished; the process must still be at work then."""
    while len(list(work.glob("[!.]*/shard.json"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert process.poll() is None


def wait_for_worker(process, seconds=60):
    """Until there is a worker process; it is still importing then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):
                if any("spawn_main" in part for part in child.cmdline()):
                    return
        time.sleep(0.005)
    raise AssertionError("no worker process was started")


def gone(processes, seconds=20):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


def test_killed_and_run_again_gives_the_bytes_of_an_undisturbed_run(
    large, prefix, sentencepiece_model
):
    options = ("--tokenizer", sentencepiece_model, "--validation-documents", 5)
    undisturbed = prefix.with_name("undisturbed")
    assert (
        run("preprocess.py", "--input", large, "--output-prefix", undisturbed, *options).status == 0
    )
    arguments = ("preprocess.py", "--input", large, "--output-prefix", prefix, *options)
    work = Path(f"{prefix}.shards")
    for count in (1, 4):
        process = start(*arguments)
        wait_for_shards(process, work, count)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        assert gone(workers), "workers outlive a killed parent"
        finished = {path.parent.name for path in work.glob("[!.]*/shard.json")}
        assert len(finished) >= count and not list(prefix.parent.glob("corpus.[!s]*"))
    answer = run(*arguments, "--workers", 3)
    assert answer.status == 0
    assert f"{len(finished)} of 12 shards were finished before" in answer.err
    for part in ("", "-validation"):
        for ending in RESULT:
            ours = Path(f"{prefix}{part}{ending}").read_bytes()
            assert ours == Path(f"{undisturbed}{part}{ending}").read_bytes()
    assert not work.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_ends_while_they_start(
    large, prefix, sentencepiece_model, number
):
    process = start(
        "preprocess.py", "--input", large, "--output-prefix", prefix, "--tokenizer",
        sentencepiece_model, "--workers", 3,
    )  # fmt: skip
    wait_for_worker(process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number and gone(workers)


@pytest.mark.parametrize("moment", ["workers start", "workers work"])
def test_ctrl_c_ends_all_processes_in_one_line(large, prefix, sentencepiece_model, moment):
    process = start(
        "preprocess.py", "--input", large, "--output-prefix", prefix, "--tokenizer",
        sentencepiece_model,
    )  # fmt: skip
    if moment == "workers start":
        wait_for_worker(process)
    else:
        wait_for_shards(process, Path(f"{prefix}.shards"), 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    for each in [psutil.Process(process.pid), *workers]:  # as a terminal does
        with contextlib.suppress(psutil.NoSuchProcess):  # the parent may have ended it already
            each.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *progress, last = err.splitlines()  # a slow machine gets to a line of progress
    assert last == "interrupted" and all(line.startswith("tokenise: ") for line in progress), err
    assert gone(workers)
    assert os.listdir(prefix.parent) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(
            "no mount command; tests/data/preprocessing/test_preprocess.py fakes a full disk"
        )
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(large, small_disk, sentencepiece_model):
    answer = run(
        "preprocess.py", "--input", large, "--output-prefix", small_disk / "corpus", "--tokenizer",
        sentencepiece_model,
    )  # fmt: skip
    line = answer.error_line()
    assert line.startswith(f"{small_disk}/corpus.shards: no space left on the disk; free some")
    assert os.listdir(small_disk) == []


FORBIDDEN = ("torch", "megatron", "transformer_engine", "apex", "transformers")


def test_no_process_imports_a_gpu_library(tmp_path, corpus, prefix, hf_folder):
    for name in FORBIDDEN:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    parquet = write_corpus(tmp_path / "in" / "a.parquet", texts(3))
    tokenizers = (("--tokenizer", hf_folder), ("--train-sentencepiece", 300))
    for number, choice in enumerate(tokenizers):
        answer = run(
            "preprocess.py", "--input", corpus, parquet, "--output-prefix", f"{prefix}{number}",
            *choice, PYTHONPATH=str(tmp_path),
        )  # fmt: skip
        assert answer.status == 0, answer.err
        assert len(TokenDataset(f"{prefix}{number}")) == 23
    answer = run("inspect_data.py", f"{prefix}0", "--verify", PYTHONPATH=str(tmp_path))
    assert answer.status == 0, answer.err
