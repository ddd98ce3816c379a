"""A recipe with everything in it, in an empty folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lctw_megatron.launch.stage_graph import StageGraph, build_stage_graph

RECIPE = """\
name: demo
output_dir: out
prepare:
  inputs: [corpus/*.jsonl.gz, more texts]
  output_prefix: data/books
  train_sentencepiece: 4096
  validation_documents: 8
  workers: 4
model: tiny_llama
layout: {tensor: 2, sequence: true}
data: {train: data/books, validation: data/books-validation, sequence_length: 256}
training: {steps: 100}
scoring: {scorer: base, window: 256, stride: 192, shards: 4}
evaluation:
  data: data/books-validation
  sequence_length: 1024
  window: 256
  key_checkpoint: uniform
  note: A run this small proves the road, not the method.
runs:
  base: {layout: single}
  uniform: {start: base, data: {sequence_length: 1024}}
  dense: {start: base, data: {sequence_length: 1024}, weighting: dense}
cluster: slurm_cpu_test
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StageGraph]:
    """Plans RECIPE, or another text, with overrides."""
    monkeypatch.chdir(tmp_path)

    def make(text: str = RECIPE, *overrides: str) -> StageGraph:
        Path("recipe.yaml").write_text(text)
        return build_stage_graph("recipe.yaml", overrides)

    return make
