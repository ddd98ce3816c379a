"""The whole road through the real tools: import, preprocess, score, train, kill, resume, export,
verify; signals; and a rank that dies."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lctw_megatron.platform.capabilities import capabilities
from tests.conversion.hf_models import make_model
from tests.gpu.runs import logged
from tests.gpu.tool import TIMEOUT, Tool, run
from tests.tokenizer_files import VOCAB_SIZE, hf_folder, real_text  # noqa: F401 (a fixture)

RANKS = min(2, capabilities().gpus)
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
)  # fmt: skip
STEPS = 12


@pytest.fixture(scope="module")
def scene(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A Hugging Face model with a tokenizer, imported; a corpus, preprocessed."""
    folder = tmp_path_factory.mktemp("road")
    make_model("llama", folder / "hf", **SIZES)
    for file in hf_folder.iterdir():
        shutil.copy(file, folder / "hf")
    (folder / "texts").mkdir()
    for number in range(24):
        text = real_text()
        begin = number * 2000 % (len(text) - 8000)
        (folder / "texts" / f"{number}.txt").write_text(text[begin : begin + 8000])
    run("convert", "import", "--hf", folder / "hf", "--output", folder / "start")
    inputs = ["--input", folder / "texts", "--output-prefix", folder / "data"]
    run("preprocess", *inputs, "--tokenizer", folder / "hf", "--validation-documents", "2")
    return folder


def score(scene: Path, name: str, ranks: int, *more: object) -> bytes:
    arguments = ["--data", scene / "data", "--checkpoint", scene / "start", "--name", name]
    run("score", *arguments, "--window", "128", "--stride", "96", *more, ranks=ranks)
    return (scene / f"data.{name}.bin").read_bytes()


def recipe(scene: Path, folder: Path, **training: Any) -> Path:
    """Tensor-parallel over the GPUs at hand, dense weights from the sidecar, saving as it goes."""
    values = {
        "name": "road",
        "output_dir": str(folder),
        "start": str(scene / "start"),
        "data": {"train": str(scene / "data"), "sequence_length": 512, "packing": "pack"},
        "layout": {"tensor": RANKS, "sequence": RANKS > 1},
        "weighting": {"scheme": "dense", "interpolation": 0.5, "window": 128, "stride": 96},
        "training": {
            "steps": STEPS, "global_batch_size": 4, "lr": 1e-3, "warmup_steps": 0,
            "precision": "bf16", "save_interval": 2, "async_save": True, "tensorboard": False,
            "deterministic": True,
        } | training,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def wait_for_step(folder: Path, step: int) -> None:
    """Until ``step`` lines of metrics are there."""
    path = folder / "main" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not path.exists() or path.read_text().count("\n") < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


@pytest.mark.gpus(2)
def test_two_gpus_score_the_bytes_of_one(scene: Path) -> None:
    assert score(scene, "one", 1) == score(scene, "two", 2)
    assert score(scene, "one32", 1, "--precision", "fp32") != score(scene, "two", 2)


def test_killed_training_goes_on_bit_for_bit_and_leaves_as_a_hugging_face_model(
    scene: Path, tmp_path: Path
) -> None:
    score(scene, "short_loss", 1)
    whole = recipe(scene, tmp_path / "whole")
    run("train", whole, ranks=RANKS)
    broken = recipe(scene, tmp_path / "broken")
    tool = Tool("train", broken, ranks=RANKS)
    wait_for_step(tmp_path / "broken", 7)
    victim = tool.ranks()[-1] if RANKS > 1 else tool.process
    victim.kill()
    assert tool.end().status != 0
    run("train", broken, ranks=RANKS)
    expected, found = (logged(tmp_path / name / "main") for name in ("whole", "broken"))
    assert [line["step"] for line in found] == list(range(STEPS))
    assert found == expected
    checkpoint, hf = tmp_path / "broken" / "main", tmp_path / "hf"
    run("convert", "export", "--checkpoint", checkpoint, "--output", hf)
    shown = run("convert", "verify", "--hf", hf, "--checkpoint", checkpoint, "--length", "128")
    assert "verify: equal" in shown
    run("evaluate_model", "losses", "--checkpoint", checkpoint, "--data",
        scene / "data-validation", "--window", "128", "--sequence-length", "512")  # fmt: skip


def test_a_signal_saves_and_asks_to_be_started_again(scene: Path, tmp_path: Path) -> None:
    path = recipe(scene, tmp_path / "asked", steps=1000, save_interval=None)
    path.write_text(path.read_text().replace(f"tensor: {RANKS}", "tensor: 1"))
    path.write_text(path.read_text().replace("sequence: true", "sequence: false"))
    tool = Tool("train", path)
    wait_for_step(tmp_path / "asked", 3)
    tool.process.send_signal(signal.SIGTERM)
    ended = tool.end(60)
    assert ended.status == 75, ended.output[-2000:]
    assert list((tmp_path / "asked" / "main" / "checkpoints").glob("step_*"))


@pytest.mark.gpus(2)
def test_a_rank_that_dies_ends_the_job_in_bounded_time(scene: Path, tmp_path: Path) -> None:
    tool = Tool("train", recipe(scene, tmp_path / "dies", steps=1000), ranks=2)
    wait_for_step(tmp_path / "dies", 3)
    tool.ranks()[1].kill()
    begin = time.monotonic()
    assert tool.end(120).status != 0
    assert time.monotonic() - begin < 60
