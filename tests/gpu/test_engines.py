"""Checkpoints cross between TransformerEngine's layers and ours, both ways: resume, start, score,
evaluate, export. Without the package a process must not miss what the other left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from tests.conversion.hf_models import make_model
from tests.gpu.runs import logged
from tests.gpu.tool import run
from tests.tokenizer_files import VOCAB_SIZE, hf_folder, real_text  # noqa: F401 (a fixture)

pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
)  # fmt: skip
ENGINE = {"TransformerEngine": True, "ours": False}


@pytest.fixture(scope="module")
def scene(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """For Llama and Qwen3 (norms of their own): two steps trained with each engine."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / "texts" / f"{number}.txt").write_text(real_text()[number * 900 :][:8000])
    for name in ("llama", "qwen3"):
        make_model(name, folder / name, **SIZES)
        for file in hf_folder.iterdir():
            shutil.copy(file, folder / name)
        output = folder / f"{name}_start"
        run("convert", "import", "--hf", folder / name, "--output", output)
    inputs = ["--input", folder / "texts", "--output-prefix", folder / "data"]
    run("preprocess", *inputs, "--tokenizer", folder / "llama")
    for name in ("llama", "qwen3"):
        for engine, there in ENGINE.items():
            run("train", recipe(folder, f"{name}_{engine}", f"{name}_start", 4), engine=there)
    return folder


def recipe(scene: Path, name: str, start: str, steps: int) -> Path:
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
    return path


def losses(folder: Path) -> list[float]:
    return [line["loss/plain"] for line in logged(folder / "main")]


@pytest.mark.parametrize("model", ["llama", "qwen3"])
@pytest.mark.parametrize(("wrote", "reads"), [("ours", "TransformerEngine"),
                                              ("TransformerEngine", "ours")])  # fmt: skip
def test_what_one_engine_saved_the_other_goes_on_with(
    model: str, wrote: str, reads: str, scene: Path
) -> None:
    source = scene / f"{model}_{wrote}"
    there = ENGINE[reads]
    # Resume: back to step 2, then on with the other.
    name = f"{model}_{wrote}_then_{reads}"
    shutil.copytree(source, scene / name)
    shutil.rmtree(scene / name / "main" / "checkpoints" / "step_00000004")
    run("train", recipe(scene, name, f"{model}_start", 4), engine=there)
    np.testing.assert_allclose(losses(scene / name), losses(source), rtol=5e-3)
    # Start: the first loss is that of the trained weights.
    trained = f"{model}_{wrote}/main/checkpoints/step_00000004"
    for engine, here in ENGINE.items():
        run("train", recipe(scene, f"{name}_{engine}", trained, 1), engine=here)
    firsts = [losses(scene / f"{name}_{engine}")[0] for engine in ENGINE]
    np.testing.assert_allclose(firsts[0], firsts[1], rtol=2e-3)
    # Score and evaluate.
    arguments = ["--data", scene / "data", "--checkpoint", scene / trained]
    values = []
    for engine, here in ENGINE.items():
        sidecar = f"{name}_{engine}"
        run("score", *arguments, "--window", "128", "--stride", "96", "--name", sidecar,
            engine=here)  # fmt: skip
        values.append(np.array(Sidecar(TokenDataset(str(scene / "data")), sidecar).values))
        output = scene / f"{sidecar}.evaluation.json"
        run("evaluate_model", "losses", *arguments, "--output", output, "--max-sequences", "4",
            engine=here)  # fmt: skip
    assert (np.isnan(values[0]) == np.isnan(values[1])).all()
    assert abs(np.nanmean(values[0]) - np.nanmean(values[1])) < 5e-3 * np.nanmean(values[0])
    found = [
        json.loads((scene / f"{name}_{engine}.evaluation.json").read_text())["loss"]
        for engine in ENGINE
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3)
    # Export.
    hf = scene / f"{name}_hf"
    run("convert", "export", "--checkpoint", scene / trained, "--output", hf, engine=there)
    shown = run("convert", "verify", "--hf", hf, "--checkpoint", scene / trained, "--length",
                "64", engine=there)  # fmt: skip
    assert "verify: equal" in shown
