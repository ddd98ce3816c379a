"""Windows that cannot work are refused with their numbers."""

import pytest

from lctw_megatron.config.rules import check_evaluation, check_run, check_scoring
from lctw_megatron.config.schema import EvaluationConfig, PrepareConfig, ScoringConfig
from lctw_megatron.config.validation_errors import build
from lctw_megatron.errors import InputError
from tests.config.test_layout_rules import run_config


def weighted(**weighting):
    values = run_config().model_dump()
    values["weighting"] = weighting
    return type(run_config()).model_validate(values)


@pytest.mark.parametrize(
    ("weighting", "rule"),
    [
        ({"window": 64, "stride": 65}, "weighting.stride 65 is larger than weighting.window 64"),
        ({"scheme": "dense", "mode": "self", "stride": 32}, "weighting.window is missing"),
        ({"scheme": "dense", "mode": "self", "window": 32}, "weighting.stride is missing"),
        (
            {"scheme": "dense", "mode": "self", "window": 1024, "stride": 32},
            "weighting.window 1024 is not shorter than the sequence length 1024",
        ),
    ],
)
def test_windows_that_do_not_fit_are_refused(weighting, rule):
    with pytest.raises(InputError, match=rule):
        check_run(weighted(**weighting))


def test_windows_that_fit_are_accepted():
    check_run(weighted(scheme="dense", mode="self", window=1023, stride=1023))
    check_run(weighted(scheme="uniform", mode="self"))
    check_run(weighted(scheme="position", mode="self"))
    check_run(weighted(scheme="eslm", keep_fraction=0.5, mode="self"))
    check_run(weighted(scheme="dense"))


def test_scoring_windows_follow_the_same_rules():
    fitting = {"scorer": "base", "window": 128, "stride": 96}
    check_scoring(ScoringConfig(**fitting))
    check_scoring(ScoringConfig(**fitting, sequence_length=129))
    with pytest.raises(InputError, match="scoring.stride 129"):
        check_scoring(ScoringConfig(**fitting | {"stride": 129}))
    with pytest.raises(InputError, match="scoring.window 128 is not shorter"):
        check_scoring(ScoringConfig(**fitting, sequence_length=128))


def test_a_name_that_no_sidecar_may_have_is_refused_before_its_scorer_is_trained():
    fitting = {"scorer": "base", "window": 128, "stride": 96}
    check_scoring(ScoringConfig(**fitting, name="short_2-a"))
    for name in ("v2.short", "../a", "short loss"):
        with pytest.raises(InputError, match="scoring.name is .*, expected letters, digits, _ and"):
            check_scoring(ScoringConfig(**fitting, name=name))


def test_evaluation_windows_follow_the_same_rules_and_are_needed():
    check_evaluation(EvaluationConfig(data="held-out", window=64, stride=64, sequence_length=65))
    for wrong, rule in [
        ({"window": 64, "stride": 65}, "evaluation.stride 65 is larger"),
        ({"window": 64, "sequence_length": 64}, "evaluation.window 64 is not shorter"),
        ({"stride": 65}, "evaluation.stride does nothing without evaluation.window"),
        ({"key_checkpoint": "base"}, "key_checkpoint does nothing without evaluation.window"),
    ]:
        with pytest.raises(InputError, match=rule):
            check_evaluation(EvaluationConfig(data="held-out", **wrong))


def test_positions_cover_the_sequence_and_the_rates_are_ordered():
    check_run(run_config(model__max_position_embeddings=1024))
    with pytest.raises(InputError, match="max_position_embeddings 1023 is smaller than data.seq"):
        check_run(run_config(model__max_position_embeddings=1023))
    with pytest.raises(InputError, match="training.min_lr 1.0 is above training.lr"):
        check_run(run_config(training__min_lr=1.0))


def test_what_would_be_passed_over_is_refused():
    check_run(run_config(training__min_lr=1e-6, training__schedule="cosine"))
    with pytest.raises(InputError, match="min_lr is 1e-06, but training.schedule is constant"):
        check_run(run_config(training__min_lr=1e-6))
    check_run(run_config(training__keep_every=4, training__save_interval=2))
    with pytest.raises(InputError, match="keep_every is 4, but without training.save_interval"):
        check_run(run_config(training__keep_every=4))
    plain, weighted = {"prefix": "a"}, {"prefix": "b", "weight": 3}
    check_run(run_config(data__validation=[plain, {"prefix": "c"}]))
    with pytest.raises(InputError, match="data.validation gives b the weight 3, but"):
        check_run(run_config(data__validation=[plain, weighted]))


def test_a_list_that_is_needed_says_how_many_it_needs():
    prepare = {"inputs": [], "output_prefix": "p"}
    with pytest.raises(InputError, match=r"r: inputs is \[\], expected a list of 1 or more"):
        build(PrepareConfig, prepare, "r")


def test_data_are_named_and_named_once():
    with pytest.raises(InputError, match="data.train is empty; name the prefix of at least one"):
        check_run(run_config(data__train=[]))
    check_run(run_config(data__train=["a", "b"], data__validation=["a"]))
    for field in ("train", "validation"):
        with pytest.raises(InputError, match=f"data.{field} names a 2 times; "):
            check_run(run_config(**{f"data__{field}": ["a", "b", "./a"]}))
    with pytest.raises(InputError, match="training.trackers names wandb 2 times; name it once"):
        check_run(run_config(training__trackers=["wandb", "mlflow", "wandb"]))


def test_validation_needs_data():
    check_run(run_config(training__eval_interval=5, data__validation=[{"prefix": "held-out"}]))
    with pytest.raises(InputError, match="eval_interval is 5, but data.validation names no"):
        check_run(run_config(training__eval_interval=5))


def test_windows_of_self_scoring_are_split_over_the_tensor_ranks_too():
    split = dict(layout__tensor=4, layout__sequence=True, weighting__mode="self")
    dense = dict(weighting__scheme="dense", weighting__window=64, weighting__stride=48)
    check_run(run_config(**split, **dense))
    with pytest.raises(InputError, match=r"weighting.window \(62\) must be divisible by layout.t"):
        check_run(run_config(**split, **dense | {"weighting__window": 62}))


def test_layers_side_by_side_are_no_layers_one_after_the_other():
    phi = dict(model__architecture="phi", model__qkv_bias=True)
    check_run(run_config(**phi))
    with pytest.raises(InputError, match="megatron.model is hybrid.* phi .*side by side; set gpt"):
        check_run(run_config(**phi, megatron__model="hybrid"))
    experts = dict(model__num_moe_experts=4)
    check_run(run_config(**experts, megatron__model="hybrid"))
    with pytest.raises(InputError, match="num_moe_experts is 4, but .* phi has no experts"):
        check_run(run_config(**phi, **experts))


def test_the_parallel_sizes_are_checked_too():
    with pytest.raises(InputError, match="layout.pipeline"):
        check_run(run_config(layout__pipeline=3))
