"""Frozen scoring: right values, the same bytes however the work was split, nothing done twice."""

import json
from pathlib import Path
from threading import Timer
from typing import Any
from unittest import mock

import numpy as np
import pytest

from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.scoring.sidecar_shard import shard_files
from lctw_megatron.scoring.windows import Windowing, document_windows, window_statistics
from tests.scoring.processes import Ranks, run_score, score
from tests.scoring.scene import Scene, sidecar_bytes
from tests.scoring.scorers import MODEL, write_checkpoint, write_corpus


def losses_one_window_at_a_time(
    checkpoint: Path, prefix: Path, windowing: Windowing, bos_id: int | None, output: Path
) -> None:
    """The definition, in plain torch on the model's logits, without batches or shards."""
    import torch

    from lctw_megatron.config.schema import LayoutConfig
    from lctw_megatron.model.checkpoint import find_checkpoint, load_weights, read_manifest
    from lctw_megatron.model.gpt import build_model
    from lctw_megatron.platform.world import initialize

    world = initialize(LayoutConfig(), 0)
    path = find_checkpoint(checkpoint)
    chunks = build_model(
        read_manifest(path).model,
        LayoutConfig(),
        max_sequence_length=128,
        dtype=torch.float32,
        device=world.device,
        seed=None,
    )
    load_weights(chunks, path)
    dataset = TokenDataset(prefix)
    values = [np.full(length, np.nan, dtype=np.float32) for length in dataset.lengths]
    for document, length in enumerate(dataset.lengths):
        for start, end, first, stop in document_windows(int(length), *windowing):
            text = torch.from_numpy(dataset[document].astype(np.int64))
            tokens, targets = text[start:end].clone(), text[first:stop]
            if start > 0 and bos_id is not None:
                tokens[0] = bos_id
            with torch.no_grad():
                logits = chunks[0](tokens[None], torch.arange(end - start)[None], None)[0]
            chances = logits[:, : MODEL["vocab_size"]].log_softmax(-1)
            rows = torch.arange(first - 1 - start, stop - 1 - start)
            values[document][first:stop] = -chances[rows, targets].numpy()
    np.save(output, np.concatenate(values))


@pytest.mark.parametrize(
    ("windowing", "add_bos"),
    [
        (Windowing(64, 32), True),
        (Windowing(50, 50, 120, True), True),
        (Windowing(30, 7, 64), False),
        (Windowing(128, 100, None, True), False),
    ],
    ids=["documents", "sequences", "no BOS", "first windows"],
)
def test_the_sidecar_holds_what_each_window_gives_alone(
    windowing: Windowing, add_bos: bool, checkpoint: Path, tmp_path: Path
) -> None:
    lengths = [300, 0, 1, 2, 40, 64, 65, 500, 121, 97]
    dataset = write_corpus(tmp_path / "corpus", lengths, add_bos=add_bos)
    arguments = ["--data", dataset.prefix, "--checkpoint", str(checkpoint / "checkpoints")]
    arguments += ["--window", str(windowing.window), "--stride", str(windowing.stride)]
    arguments += ["--tokens-per-forward", "200", "--shards", "3"]
    if windowing.sequence_length:
        arguments += ["--sequence-length", str(windowing.sequence_length)]
    if windowing.score_first_window:
        arguments += ["--score-first-window", "--name", "long_loss"]
    outcome = score(tmp_path / "output", arguments)
    assert outcome.status == 0, outcome.output
    alone = (checkpoint, tmp_path / "corpus", windowing, 1 if add_bos else None, tmp_path / "a.npy")
    assert Ranks(tmp_path / "output", 1, losses_one_window_at_a_time, *alone).join().status == 0

    sidecar = Sidecar(dataset, "long_loss" if windowing.score_first_window else "short_loss")
    sidecar.verify()
    np.testing.assert_allclose(sidecar.values, np.load(tmp_path / "a.npy"), rtol=1e-5, atol=1e-5)
    statistics = window_statistics(lengths, *windowing)
    manifest = sidecar.manifest
    assert manifest.scored == statistics.scored == np.isfinite(sidecar.values).sum()
    assert manifest.min_context == statistics.min_context
    assert manifest.mean_context == pytest.approx(statistics.mean_context)
    assert (manifest.window, manifest.stride) == windowing[:2]
    assert (manifest.sequence_length, manifest.score_first_window) == windowing[2:]
    assert manifest.scorer["model"]["num_layers"] == MODEL["num_layers"]
    assert manifest.scorer["step"] == 0
    assert Path(manifest.scorer["checkpoint"]).parent.parent == checkpoint


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_number_of_ranks_changes_no_byte(ranks: int, scene: Scene, copy: Scene) -> None:
    outcome = score(copy.folder / "output", copy.arguments, ranks)
    assert outcome.status == 0, outcome.output
    assert sidecar_bytes(copy.prefix) == scene.reference
    assert not Path(f"{copy.prefix}.short_loss.shards").exists()
    assert outcome.output.count("short_loss: ") == 2  # the plan and the result, on one rank only


def test_pipeline_stages_change_no_byte(scene: Scene, copy: Scene) -> None:
    outcome = score(copy.folder / "output", [*copy.arguments, "--pipeline", "2"], 2)
    assert outcome.status == 0, outcome.output
    assert sidecar_bytes(copy.prefix) == scene.reference


def test_tensor_parallel_ranks_share_the_shards(scene: Scene, copy: Scene) -> None:
    # Sums over split matrices have another order: equal to 1e-5 nats, and said in the manifest.
    outcome = score(copy.folder / "output", [*copy.arguments, "--tensor", "2"], 4)
    assert outcome.status == 0, outcome.output
    dataset = TokenDataset(copy.prefix)
    values = Sidecar(dataset).values
    expected = np.frombuffer(scene.reference[".bin"], "<f4")
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    assert Sidecar(dataset).manifest.scorer["tensor"] == 2


EXPERTS = MODEL | {"num_moe_experts": 6}


def score_with_half_the_experts(arguments: list[str]) -> None:
    """tools/score.py, on a rank that holds half of each layer's experts, or fails."""
    from lctw_megatron.scoring import scorer

    real = scorer.build_model

    def build(*given: Any, **named: Any) -> list[Any]:
        (chunk,) = chunks = real(*given, **named)
        assert [len(layer.mlp.experts.local_experts) for layer in chunk.decoder.layers] == [3, 3]
        return chunks

    with mock.patch.object(scorer, "build_model", build):
        run_score(arguments)


def test_tensor_parallel_ranks_share_a_scorers_experts_out(tmp_path: Path) -> None:
    """And no others: data-parallel ranks run different numbers of windows."""
    output, windowing = tmp_path / "output", Windowing(64, 32)
    dataset = write_corpus(tmp_path / "corpus", [300, 1, 64, 65, 500, 121], add_bos=True)
    assert (
        Ranks(output, 1, write_checkpoint, tmp_path / "checkpoints", 1, EXPERTS).join().status == 0
    )
    arguments = ["--data", dataset.prefix, "--checkpoint", str(tmp_path), "--tensor", "2"]
    arguments += [
        "--window",
        "64",
        "--stride",
        "32",
        "--tokens-per-forward",
        "128",
        "--shards",
        "3",
    ]
    outcome = Ranks(output, 4, score_with_half_the_experts, arguments).join()
    assert outcome.status == 0, outcome.output
    alone = (tmp_path, tmp_path / "corpus", windowing, 1, tmp_path / "a.npy")
    assert Ranks(output, 1, losses_one_window_at_a_time, *alone).join().status == 0
    expected = np.load(tmp_path / "a.npy")
    np.testing.assert_allclose(Sidecar(dataset).values, expected, rtol=1e-5, atol=1e-5)


def test_array_jobs_change_no_byte_and_merge_wants_all_of_them(scene: Scene, copy: Scene) -> None:
    output = copy.folder / "output"
    for number in (4, 0, 2, 1):
        assert score(output, [*copy.arguments, "--shard", f"{number}/5"]).status == 0
    outcome = score(output, [*copy.arguments, "--merge"])
    assert outcome.status == 2
    assert "1 of 5 shards are missing (3)" in outcome.output
    assert "--shard 3/5" in outcome.output
    assert not Path(f"{copy.prefix}.short_loss.json").exists()

    assert score(output, [*copy.arguments, "--shard", "3/5"]).status == 0
    outcome = score(output, [*copy.arguments, "--shard", "3/5"])
    assert outcome.status == 0
    assert "1 of 1 shards finished before" in outcome.output
    assert score(output, [*copy.arguments, "--merge"]).status == 0
    assert sidecar_bytes(copy.prefix) == scene.reference
    for again in ([], ["--merge"], ["--shard", "3/5"]):  # a requeued job finds it done
        outcome = score(output, [*copy.arguments, *again])
        assert outcome.status == 0
        assert "finished before" in outcome.output
        assert "score:" not in outcome.output
    assert not shard_files(Path(f"{copy.prefix}.short_loss.shards"))


def test_finished_shards_are_not_scored_again(scene: Scene, copy: Scene) -> None:
    output = copy.folder / "output"
    assert score(output, [*copy.arguments, "--shard", "1/4"]).status == 0
    (path,) = shard_files(Path(f"{copy.prefix}.short_loss.shards"))
    before = path.stat().st_mtime_ns
    for number in (0, 2, 3):
        assert score(output, [*copy.arguments, "--shard", f"{number}/4"], 2).status == 0
    assert path.stat().st_mtime_ns == before
    outcome = score(output, copy.arguments)  # takes up the four shards: only the merge is left
    assert "4 of 4 shards finished before" in outcome.output
    assert "score:" not in outcome.output
    assert sidecar_bytes(copy.prefix) == scene.reference


def test_a_corpus_without_long_documents_needs_no_model(copy: Scene) -> None:
    write_corpus(copy.folder / "short", [64, 3, 0, 20])
    arguments = ["--data", str(copy.folder / "short"), *copy.arguments[2:]]
    outcome = score(copy.folder / "output", arguments)
    assert outcome.status == 0, outcome.output
    assert "nothing scored, as no document is longer than a window and" in outcome.output
    manifest = json.loads((copy.folder / "short.short_loss.json").read_text())
    assert (manifest["scored"], manifest["min_context"], manifest["mean"]) == (0, None, None)
    assert np.isnan(Sidecar(TokenDataset(copy.folder / "short")).values).all()


def test_bf16_scores_agree_with_fp32_to_a_tenth_and_are_no_bf16_numbers(
    scene: Scene, copy: Scene
) -> None:
    outcome = score(copy.folder / "output", [*copy.arguments, "--precision", "bf16"])
    assert outcome.status == 0, outcome.output
    values = Sidecar(TokenDataset(copy.prefix)).values
    expected = np.frombuffer(scene.reference[".bin"], "<f4")
    scored = np.isfinite(expected)
    assert np.array_equal(scored, np.isfinite(values))
    values = values[scored]
    assert np.abs(values - expected[scored]).mean() < 0.1
    # Losses are computed in float32: nearly none has the 16 empty low bits of a bf16 number.
    assert (values.view(np.uint32) & 0xFFFF == 0).mean() < 0.01


def test_a_scorer_whose_losses_are_not_finite_is_refused(copy: Scene) -> None:
    folder = copy.folder / "broken"
    model = {**MODEL, "init_method_std": 1e18}  # finite, but their products are not
    assert Ranks(copy.folder / "output", 1, write_checkpoint, folder, 1, model).join().status == 0
    arguments = [*copy.arguments[:2], "--checkpoint", str(folder), *copy.arguments[4:]]
    outcome = score(copy.folder / "output", arguments)
    assert outcome.status == 2
    assert "loss nan at token" in outcome.output or "loss inf at token" in outcome.output
    assert not shard_files(Path(f"{copy.prefix}.short_loss.shards"))


def test_shards_that_other_ranks_have_written_may_be_seen_late(tmp_path: Path) -> None:
    from lctw_megatron.scoring.score_corpus import wait_for

    (tmp_path / "here").touch()
    late = Timer(0.7, (tmp_path / "late").touch)
    late.start()
    wait_for([tmp_path / "here", tmp_path / "late"], seconds=60)
    assert (tmp_path / "late").exists()
    wait_for([tmp_path / "never"], seconds=0.1)  # the merge says what is missing
