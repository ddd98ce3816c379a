"""The user's road: import a Hugging Face model, train it longer, publish it."""

import json

import pytest

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.verify import compare_logits, compare_tensors, config_differences
from lctw_megatron.model.checkpoint import find_checkpoint, read_manifest
from lctw_megatron.platform.world import shut_down
from tests.conversion.hf_models import MAX_POSITIONS, make_model, random_tokens
from tests.training.layouts import make_data

LOGITS = 1e-5


THETA = {"rope_theta": 15.3e6}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": MAX_POSITIONS}
PLAIN = "default, maximum 64, theta 500,000"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (THETA, "default, maximum 128, theta 15,300,000"),
        (
            {"rope_scaling": DYNAMIC},
            "dynamic, factor 2, original maximum 64, maximum 128, theta 500,000 to the original "
            "maximum, 1,694,746 at 128",
        ),
    ],
    ids=["theta", "dynamic"],
)
def test_training_starts_from_an_import_with_another_rope_and_length_and_is_exported(
    tmp_path, capsys, changes, line
):
    from lctw_megatron.training.loop import train

    length = 2 * MAX_POSITIONS
    hf = make_model("llama", tmp_path / "hf")
    import_hf(hf, tmp_path / "imported")
    imported = read_manifest(tmp_path / "imported").model
    run = RunConfig.model_validate(
        {
            "name": "extended",
            "run_dir": str(tmp_path / "run"),
            "start": str(tmp_path / "imported"),
            "data": {"train": make_data(tmp_path), "sequence_length": length},
            "model": imported.model_dump(exclude={"max_position_embeddings"})
            | changes,
            "weighting": {"scheme": "dense", "interpolation": 0.75},
            "training": {
                "steps": 2, "global_batch_size": 2, "lr": 1e-2, "warmup_steps": 0,
                "tensorboard": False,
            },
        }
    )  # fmt: skip
    try:
        train(run)
    finally:
        shut_down()
    trained = find_checkpoint(tmp_path / "run")
    assert read_manifest(trained).step == 2 and read_manifest(trained).optimizer
    export_hf(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dynamic = "rope_scaling" in changes
    assert config["rope_theta"] == changes.get("rope_theta", 5e5)
    assert config["max_position_embeddings"] == (MAX_POSITIONS if dynamic else length)
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("rope: ")]
    assert said == [f"rope: {PLAIN}", f"rope: {PLAIN} -> {line}", f"rope: {line}"]
    assert config_differences(tmp_path / "out", trained) == []
    assert all(result.different == 0 for result in compare_tensors(tmp_path / "out", trained))
    logits = compare_logits(tmp_path / "out", trained, random_tokens(2 * length))
    assert logits.largest < LOGITS
    # It has learned something, and is not the model that it began as.
    assert all(result.different > 0 for result in compare_tensors(hf, trained))
