"""Checkpoints cross between TransformerEngine's layers and ours, both ways: resume, start, score,
evaluate, export. Without the package a process must not miss what the other left out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from tests.conversion.hf_models import make_model
from tests.gpu.runs import logged
from tests.tokenizer_files import VOCAB_SIZE, hf_folder, real_text  # noqa: F401 (a fixture)

pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
)  # fmt: skip
ENGINES = {"TransformerEngine": "with", "ours": "without"}
MODELS = ("llama", "qwen3", "phi_tied_dynamic")
"""Qwen3 has norms of its own on queries and keys, Phi one norm that is in no linear layer."""

Command = list[str]


def journey(scene: Path, engine: str, commands: list[Command]) -> None:
    """Run the tools one after the other in one process."""
    file = scene / "commands.json"
    file.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.engine_journey", ENGINES[engine], str(file)],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def recipe(scene: Path, name: str, start: str, steps: int) -> str:
    values = {
        "name": "engines",
        "output_dir": str(scene / name),
        "start": str(scene / start),
        "data": {"train": str(scene / "data"), "sequence_length": 512},
        "training": {
            "steps": steps, "global_batch_size": 4, "lr": 1e-3, "warmup_steps": 0,
            "precision": "bf16", "save_interval": 2, "keep_last": 9, "tensorboard": False,
        },
    }  # fmt: skip
    (scene / name).mkdir(exist_ok=True)
    path = scene / name / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def trained(scene: Path, model: str, engine: str) -> Path:
    return scene / f"{model}_{engine}" / "main" / "checkpoints" / "step_00000004"


@pytest.fixture(scope="module")
def scene(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Both models, four steps trained with each engine; then what each makes of both's."""
    scene = tmp_path_factory.mktemp("engines")
    (scene / "texts").mkdir()
    for number in range(12):
        (scene / "texts" / f"{number}.txt").write_text(real_text()[number * 900 :][:8000])
    first: list[Command] = []
    for model in MODELS:
        make_model(model, scene / model, **SIZES)
        for file in hf_folder.iterdir():
            shutil.copy(file, scene / model)
        output = str(scene / f"{model}_start")
        first.append(["convert", "import", "--hf", str(scene / model), "--output", output])
    first.append(
        ["preprocess", "--input", str(scene / "texts"), "--output-prefix", str(scene / "data"),
         "--tokenizer", str(scene / "llama")]
    )  # fmt: skip
    for engine in ENGINES:
        runs = [recipe(scene, f"{model}_{engine}", f"{model}_start", 4) for model in MODELS]
        journey(scene, engine, [*first, *(["train", path] for path in runs)])
        first = []
    return scene


def commands(scene: Path, model: str, wrote: str, reads: str) -> list[Command]:
    """What ``reads`` does with what ``wrote`` saved."""
    name = f"{model}_{wrote}_{reads}"
    checkpoint = str(trained(scene, model, wrote))
    shutil.copytree(scene / f"{model}_{wrote}", scene / name)
    shutil.rmtree(scene / name / "main" / "checkpoints" / "step_00000004")
    data = ["--data", str(scene / "data"), "--checkpoint", checkpoint]
    hf = str(scene / f"{name}_hf")
    return [
        ["train", recipe(scene, name, f"{model}_start", 4)],
        ["train", recipe(scene, f"{name}_started", checkpoint, 1)],
        ["score", *data, "--window", "128", "--stride", "96", "--name", name],
        ["evaluate_model", "losses", *data, "--output", str(scene / f"{name}.json"),
         "--max-sequences", "4"],
        ["convert", "export", "--checkpoint", checkpoint, "--output", hf],
        ["convert", "verify", "--checkpoint", checkpoint, "--hf", hf, "--length", "64"],
    ]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wrote", ENGINES)
def test_what_one_engine_saved_both_go_on_with(model: str, wrote: str, scene: Path) -> None:
    """verify, the last command, compares tensors and logits itself."""
    for reads in ENGINES:
        journey(scene, reads, commands(scene, model, wrote, reads))
    whole = [line["loss/plain"] for line in logged(scene / f"{model}_{wrote}" / "main")]
    first, mean, held_out = [], [], []
    for reads in ENGINES:
        name = f"{model}_{wrote}_{reads}"
        resumed = [line["loss/plain"] for line in logged(scene / name / "main")]
        np.testing.assert_allclose(resumed, whole, rtol=5e-3)
        first.append(logged(scene / f"{name}_started" / "main")[0]["loss/plain"])
        sidecar = Sidecar(TokenDataset(str(scene / "data")), name)
        mean.append(float(np.nanmean(np.asarray(sidecar.values))))
        held_out.append(json.loads((scene / f"{name}.json").read_text())["loss"])
    for pair in (first, mean, held_out):
        np.testing.assert_allclose(pair[0], pair[1], rtol=2e-3)
