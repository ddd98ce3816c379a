"""The Llama 3 8B recipe says what the paper's settings are, and fits 8 and 64 GPUs.

RENEW_GOLDEN=1 python -m pytest tests/recipes writes its batch scripts anew; read the difference.
"""

import os
from pathlib import Path

import pytest

from lctw_megatron.config.layout_rules import check_layout
from lctw_megatron.config.load import load_recipe, resolve_run
from lctw_megatron.launch.queue import plan_jobs
from lctw_megatron.launch.stage_graph import build_stage_graph

PROJECT = Path(__file__).parents[2]
RECIPE = PROJECT / "recipes" / "llama3_8b_32k" / "recipe.yaml"


def test_the_settings_are_those_of_the_paper():
    recipe = load_recipe(RECIPE)
    run = resolve_run(recipe)
    assert run.start == "models/llama3_8b" and recipe.scoring.scorer == run.start
    assert run.data.sequence_length == 32768 == recipe.scoring.sequence_length
    assert run.model.rope_theta == 15.3e6 and run.model.num_layers == 32
    assert (recipe.scoring.window, recipe.scoring.stride) == (8192, 6144)
    weighting = run.weighting
    assert (weighting.scheme, weighting.mode, weighting.interpolation) == ("dense", "frozen", 0.75)
    assert (weighting.window, weighting.stride) == (8192, 6144)
    training = run.training
    assert (training.lr, training.warmup_steps, training.schedule) == (2e-5, 20, "constant")
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.95)


@pytest.mark.parametrize("ranks, layout", [(8, None), (64, "gpu64_8b_32k")])
def test_the_layouts_fit_the_ranks_and_the_batch(ranks, layout):
    run = resolve_run(load_recipe(RECIPE, [f"layout={layout}"] if layout else []))
    check_layout(run, ranks)


def test_plain_training_for_comparison_is_one_override_away():
    run = resolve_run(load_recipe(RECIPE, ["weighting=uniform", "output_dir=runs/uniform"]))
    assert run.weighting.scheme == "uniform" and run.weighting.window is None
    assert run.run_dir == "runs/uniform/main"


def test_the_scripts_beside_it_are_what_launch_renders(monkeypatch):
    monkeypatch.chdir(PROJECT)
    graph = build_stage_graph(
        "recipes/llama3_8b_32k/recipe.yaml", (), lambda _: resolve_run(load_recipe(RECIPE)).model
    )
    folder = RECIPE.parent / "sbatch"
    scripts = {
        f"{j.name}.sbatch": j.script for j in plan_jobs(graph, graph.stages, graph.recipe.cluster)
    }
    if os.environ.get("RENEW_GOLDEN"):
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / name).write_text(script)
    assert {path.name: path.read_text() for path in folder.iterdir()} == scripts
