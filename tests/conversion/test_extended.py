"""The user's road: import a Hugging Face model, train it longer, publish it."""

import json

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.conversion.hf_export import export_hf
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.conversion.verify import compare_logits, compare_tensors, config_differences
from lctw_megatron.model.checkpoint import find_checkpoint, read_manifest
from lctw_megatron.platform.world import shut_down
from tests.conversion.hf_models import MAX_POSITIONS, make_model, random_tokens
from tests.training.layouts import make_data

LOGITS = 1e-5


def test_training_starts_from_an_import_with_another_length_and_theta_and_is_exported(tmp_path):
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
            | {"rope_theta": 15.3e6},
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
    assert config["rope_theta"] == 15.3e6 and config["max_position_embeddings"] == length
    assert config_differences(tmp_path / "out", trained) == []
    assert all(result.different == 0 for result in compare_tensors(tmp_path / "out", trained))
    logits = compare_logits(tmp_path / "out", trained, random_tokens(2 * length))
    assert logits.largest < LOGITS
    # It has learned something, and is not the model that it began as.
    assert all(result.different > 0 for result in compare_tensors(hf, trained))
