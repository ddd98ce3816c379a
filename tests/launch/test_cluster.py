"""Which cluster the jobs are for: the recipe's, a named one, and what --set changes of either."""

import pytest

from lctw_megatron.errors import InputError
from lctw_megatron.launch.launch_request import cluster_of
from tests.launch.conftest import RECIPE

WITHOUT = RECIPE.replace("cluster: slurm_cpu_test\n", "")


def test_changes_reach_the_recipes_cluster_and_a_named_one(plan):
    assert cluster_of(plan(), "slurm").nodes == 2
    assert cluster_of(plan(RECIPE, "cluster.nodes=1"), "slurm").nodes == 1
    named = cluster_of(plan(RECIPE, "cluster.nodes=3", "training.steps=7"), "slurm_h100")
    assert named.nodes == 3
    assert named.model_copy(update={"nodes": 16}) == cluster_of(plan(), "slurm_h100")


def test_without_a_section_changes_are_of_the_generic_cluster(plan):
    generic = cluster_of(plan(WITHOUT), "slurm")
    changed = cluster_of(plan(WITHOUT, "cluster.time_limit=02:00:00"), "slurm")
    assert changed.time_limit == "02:00:00" and generic.setup
    assert changed.model_copy(update={"time_limit": generic.time_limit}) == generic
    assert cluster_of(plan(WITHOUT, "cluster=slurm_cpu_test"), "slurm").nodes == 2


def test_two_names_are_refused(plan):
    with pytest.raises(InputError, match="--set cluster=slurm_h100: --cluster slurm_cpu_test is"):
        cluster_of(plan(RECIPE, "cluster=slurm_h100"), "slurm_cpu_test")
