"""A run fits what it starts from, or is refused by the name of the field."""

from types import SimpleNamespace

import pytest

from lctw_megatron.config.schema import ModelConfig
from lctw_megatron.data.manifest import TokenizerIdentity, TokenManifest
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.training import compatibility
from tests.training.layouts import make_run

TOKENIZER = TokenizerIdentity(
    kind="huggingface", path="t", digest="0" * 32, vocab_size=512, bos_id=None, eos_id=1,
    add_bos=False, add_eos=True,
)  # fmt: skip
THROUGH_FLOAT32 = 9.999999747378752e-06
"""SmolLM2's rms_norm_eps: 1e-05 that was kept in float32."""


def started(run, monkeypatch, tokenizer=None, data=TOKENIZER, **theirs):
    """``run``, completed from a start whose model has other values."""
    model = run.model.model_copy(update=theirs)
    manifest = SimpleNamespace(model=model, tokenizer=tokenizer, identity=None)
    monkeypatch.setattr(compatibility, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(compatibility, "read_manifest", lambda path: manifest)
    run = run.model_copy(update={"start": "models/start"})
    dataset = object.__new__(TokenDataset)
    dataset.prefix = "data"
    dataset._manifest = TokenManifest.model_construct(tokenizer=data, source={})
    return compatibility.complete_run(run, dataset, None)[0]


@pytest.fixture
def run(tmp_path):
    made = make_run("data", str(tmp_path / "run"), {}, "chunk", "uniform", "frozen")
    model = ModelConfig(**made.model.model_dump() | {"layernorm_epsilon": 1e-5, "vocab_size": 512})
    return made.model_copy(update={"model": model})


def test_a_number_that_went_through_float32_is_the_same_and_leaves_as_it_came(run, monkeypatch):
    completed = started(run, monkeypatch, layernorm_epsilon=THROUGH_FLOAT32)
    assert completed.model.layernorm_epsilon == THROUGH_FLOAT32


@pytest.mark.parametrize("other", [1.00001e-5, 1e-6])
def test_another_number_is_refused_by_name(run, monkeypatch, other):
    with pytest.raises(InputError, match=f"model.layernorm_epsilon is 1e-05, but .* has {other}"):
        started(run, monkeypatch, layernorm_epsilon=other)


def test_what_a_longer_context_changes_stays_the_run_s(run, monkeypatch):
    completed = started(run, monkeypatch, rope_theta=run.model.rope_theta * 30)
    assert completed.model.rope_theta == run.model.rope_theta


def test_what_a_recipe_leaves_out_is_no_other_model_than_what_it_stands_for(run, monkeypatch):
    heads, width = run.model.num_attention_heads, run.model.hidden_size
    written = {"num_query_groups": heads, "kv_channels": width // heads}
    left_out = dict.fromkeys(written)
    for ours, theirs in [(written, left_out), (left_out, written)]:
        asked = run.model_copy(update={"model": run.model.model_copy(update=ours)})
        started(asked, monkeypatch, **theirs)
        trained = run.model_copy(update={"model": run.model.model_copy(update=theirs)})
        manifest = SimpleNamespace(run=trained, model=trained.model, step=1, start=None)
        compatibility.check_unchanged(asked, manifest, None)
    asked = run.model_copy(update={"model": run.model.model_copy(update=left_out)})
    with pytest.raises(InputError, match=f"num_query_groups is {heads}, but .* has {heads // 2}"):
        started(asked, monkeypatch, num_query_groups=heads // 2)


def test_a_start_with_bos_is_refused_for_data_without(run, monkeypatch):
    data = TOKENIZER.model_copy(update={"kind": "sentencepiece"})
    theirs = {**data.model_dump(), "add_bos": True}
    with pytest.raises(InputError, match="begin without BOS .* models/start with BOS"):
        started(run, monkeypatch, theirs, data)
    started(run, monkeypatch, data.model_dump(), data)
