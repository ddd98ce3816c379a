"""What does not fit is refused before any work, with both sides named."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lctw_megatron.config.schema import LayoutConfig
from lctw_megatron.data.sidecar import Sidecar
from lctw_megatron.data.token_dataset import TokenDataset, TokenWriter
from lctw_megatron.errors import InputError
from lctw_megatron.scoring.job import Job
from lctw_megatron.scoring.merge_sidecar import merge
from lctw_megatron.scoring.sidecar_shard import ShardReader, write_shard
from lctw_megatron.scoring.windows import Windowing
from tests.scoring.processes import score
from tests.scoring.scene import EXTENSIONS, Scene
from tests.scoring.scorers import tokenizer, write_corpus


def job_of(scene: Scene, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "data": str(scene.prefix),
        "checkpoint": str(scene.checkpoint),
        "windowing": Windowing(64, 32),
        "tokens_per_forward": 256,
    }
    return Job(**{**fields, **changes})


def write_shards(job: Job, shards: int) -> None:
    """Finished shards of zeros."""
    for number in range(shards):
        tables = job.plan.tables(job.plan.shard(number, shards))
        losses = (np.zeros(int((t[:, 4] - t[:, 3]).sum()), dtype=np.float32) for t in tables)
        write_shard(job.folder, number, shards, job.settings, losses)


def test_another_tokenizer_is_refused_with_both_digests(scene: Scene, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [200], digest="7" * 32, path="other/tokenizer")
    with pytest.raises(InputError) as error:
        job_of(scene, data=str(tmp_path / "corpus"))
    for part in ("a/tokenizer", "0" * 32, "other/tokenizer", "7" * 32, str(scene.checkpoint)):
        assert part in str(error.value)


def test_a_scorer_with_bos_is_refused_for_data_without(scene: Scene, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [200], kind="sentencepiece", add_bos=True)
    with pytest.raises(InputError, match=r"begin with.* BOS .*, but a text of .* with.* BOS "):
        job_of(scene, data=str(tmp_path / "corpus"))


def test_tokens_of_a_forward_are_those_asked_for_or_follow_from_model_and_device(
    scene: Scene,
) -> None:
    assert job_of(scene, device="cuda").settings["tokens_per_forward"] == 256
    for device, tokens in (("cpu", 16384), ("cuda", 65536)):
        job = job_of(scene, name="another", tokens_per_forward=None, device=device)
        assert job.settings["tokens_per_forward"] == job.plan.tokens_per_block // 8 == tokens


def test_what_is_left_out_goes_on_as_it_was_begun_elsewhere(copy: Scene) -> None:
    free = {"precision": None, "tokens_per_forward": None}
    write_shards(job_of(copy, **free, device="cuda"), 1)
    begun = {"precision": "bf16", "tokens_per_forward": 65536}
    job = job_of(copy, **free)
    assert job.arithmetic == pickle.loads(pickle.dumps(job)).arithmetic == begun
    merge(job, 1)
    assert job_of(copy, **free).arithmetic == begun, "as the sidecar says"
    for other in ({"name": "another"}, {"windowing": Windowing(96, 32)}):
        assert job_of(copy, **free, **other).arithmetic["precision"] == "fp32"
    assert job_of(copy, precision="fp32", tokens_per_forward=None).arithmetic == {
        **begun,
        "precision": "fp32",
    }


def test_a_tokenizer_is_known_by_its_content_not_by_its_name(scene: Scene, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [200], path="moved/elsewhere")
    job_of(scene, data=str(tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windowing": Windowing(32, 64)}, "stride 64 > window 32"),
        ({"windowing": Windowing(64, 32, 64)}, "window 64 >= sequence length 64"),
        ({"windowing": Windowing(129, 64)}, "window 129.*at most 128 tokens"),
        ({"layout": LayoutConfig(tensor=3)}, r"num_attention_heads \(4\) must be divisible"),
        ({"name": "../short"}, "--name"),
        ({"checkpoint": "no/such/folder"}, "no/such/folder: no complete checkpoint"),
        ({"data": "no/such/data"}, "no/such/data"),
    ],
)
def test_contradictions_are_refused(scene: Scene, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        job_of(scene, **changes)


def one_token_changed(source: TokenDataset, prefix: Path) -> None:
    """The corpus tokenised again after one character of its text was changed."""
    with TokenWriter(prefix, tokenizer(add_bos=True)) as writer:
        for number in range(len(source)):
            document = source[number].copy()
            if number == len(source) // 2:
                document[-1] = 3 if document[-1] != 3 else 4
            writer.add(document)


def test_one_changed_token_makes_sidecar_and_shards_stale(scene: Scene, copy: Scene) -> None:
    write_shards(job_of(copy), 2)
    for end in EXTENSIONS:
        Path(f"{copy.prefix}.short_loss{end}").write_bytes(scene.reference[end])
    assert job_of(copy).finished() is not None
    one_token_changed(TokenDataset(scene.prefix), copy.prefix)
    old, new = TokenDataset(scene.prefix).fingerprint, TokenDataset(copy.prefix).fingerprint
    assert old != new
    job = job_of(copy)
    for refused in (
        job.finished,
        lambda: job.finished_shards(2),
        lambda: job.is_done(0, 2, overwrite=False, log=print),
        lambda: Sidecar(job.dataset),
    ):
        with pytest.raises(InputError, match=f"{old}.*{new}"):
            refused()


def test_a_token_changed_in_the_file_itself_is_refused_at_the_merge(copy: Scene) -> None:
    write_corpus(copy.prefix, [150_000] * 2)  # too large for the sample digest to read whole
    write_shards(job_of(copy), 2)
    with open(f"{copy.prefix}.bin", "r+b") as file:
        file.seek(300_001)
        file.write(bytes([file.read(1)[0] ^ 1]))
    with pytest.raises(InputError, match="fingerprint"):
        merge(job_of(copy), 2)
    assert not Path(f"{copy.prefix}.short_loss.json").exists()


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [
        ({"windowing": Windowing(96, 32)}, "window 64", "window 96"),
        ({"windowing": Windowing(64, 16)}, "stride 32", "stride 16"),
        ({"windowing": Windowing(64, 32, 100)}, "sequence_length null", "sequence_length 100"),
        ({"windowing": Windowing(64, 32, None, True)}, "window false", "score_first_window true"),
        ({"precision": "bf16"}, 'precision "fp32"', 'precision "bf16"'),
        ({"tokens_per_forward": 512}, "tokens_per_forward 256", "tokens_per_forward 512"),
        ({"layout": LayoutConfig(tensor=2)}, "tensor 1", "tensor 2"),
    ],
)
def test_a_shard_or_sidecar_of_other_settings_is_refused_with_both_named(
    scene: Scene, copy: Scene, changes: dict[str, Any], old: str, new: str
) -> None:
    write_shards(job_of(copy), 1)
    for end in EXTENSIONS:
        Path(f"{copy.prefix}.short_loss{end}").write_bytes(scene.reference[end])
    job = job_of(copy, **changes)
    for refused in (
        job.finished,
        lambda: job.finished_shards(1),
        lambda: job.is_done(0, 1, overwrite=False, log=print),
    ):
        with pytest.raises(InputError, match=f"{old}, but {new} is asked for") as caught:
            refused()
        # Hours of work that need not be replaced.
        option = f"go on with --{old.replace('_', '-')}".replace('"', "")
        assert (option in str(caught.value)) == ("windowing" not in changes)


def test_a_shard_of_another_scorer_is_refused_or_replaced(
    scene: Scene, copy: Scene, other_checkpoint: Path
) -> None:
    output = copy.folder / "output"
    assert score(output, [*copy.arguments, "--shard", "0/2"]).status == 0
    other = [*copy.arguments[:2], "--checkpoint", str(other_checkpoint), *copy.arguments[4:]]
    outcome = score(output, [*other, "--shard", "1/2"])  # one job of an array with a wrong line
    assert outcome.status == 0
    outcome = score(output, [*copy.arguments, "--merge"])
    assert outcome.status == 2
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    mine = job_of(copy).settings["scorer_digest"]
    others = job_of(copy, checkpoint=str(other_checkpoint)).settings["scorer_digest"]
    assert mine in line
    assert others in line
    assert "00001-of-00002.losses" in line
    assert line.endswith(f"(in a recipe remove {job_of(copy).folder} and launch again)")

    outcome = score(output, [*copy.arguments, "--overwrite"])
    assert outcome.status == 0, outcome.output
    assert "1 of 2 shards finished before" in outcome.output
    assert Path(f"{copy.prefix}.short_loss.bin").read_bytes() == scene.reference[".bin"]


def test_shards_of_another_split_are_refused_or_replaced(copy: Scene) -> None:
    job = job_of(copy)
    write_shards(job, 4)
    assert job.shards(None, ranks=1) == 4
    refused = (
        "a run in 4 shards, but 8 shards are asked for; .* --shards 4 .in a recipe scoring.shard"
    )
    with pytest.raises(InputError, match=refused) as refusal:
        job.shards(8, ranks=1)
    assert str(refusal.value).endswith(f"(in a recipe remove {job.folder} and launch again)")
    write_shard(job.folder, 0, 8, job.settings, [])
    with pytest.raises(InputError, match="a run in 4 shards and a run in 8 shards"):
        job.shards(None, ranks=1)
    assert job.shards(8, ranks=1, overwrite=True) == 8
    with pytest.raises(InputError, match="100000 shards: each is a file; give at most 99999"):
        job.shards(100_000, ranks=1)
    assert [path.name for path in job.folder.glob("[!.]*")] == ["00000-of-00008.losses"]


def test_shards_of_another_job_are_not_removed_with_mine(scene: Scene, copy: Scene) -> None:
    for end in EXTENSIONS:
        Path(f"{copy.prefix}.short_loss{end}").write_bytes(scene.reference[end])
    begun_anew = job_of(copy, windowing=Windowing(96, 32))  # with --overwrite, and then killed
    write_shards(begun_anew, 1)
    job_of(copy).remove_shards()
    assert len(begun_anew.finished_shards(1)) == 1
    begun_anew.remove_shards()
    assert not begun_anew.folder.exists()


def test_the_work_decides_the_number_of_shards(tmp_path: Path, scene: Scene) -> None:
    job = job_of(scene)
    assert job.shards(None, ranks=1) == 4  # some for each rank
    assert job.shards(None, ranks=1000) == job.plan.blocks
    write_corpus(tmp_path / "short", [10, 20])
    assert job_of(scene, data=str(tmp_path / "short")).shards(None, ranks=4) == 1


def test_the_merge_puts_every_loss_in_its_place(copy: Scene) -> None:
    # Each loss says where it belongs: 1000 x document + token.
    write_corpus(copy.prefix, lengths := [0, 70, 1, 300, 64, 65, 2, 500, 0])
    job = job_of(copy)
    for number in range(3):
        losses = (
            np.concatenate([1000 * d + np.arange(first, stop) for d, _, _, first, stop in table])
            for table in job.plan.tables(job.plan.shard(number, 3))
        )
        write_shard(job.folder, number, 3, job.settings, (x.astype(np.float32) for x in losses))
    manifest = merge(job, 3)
    sidecar = Sidecar(job.dataset)
    for document, length in enumerate(lengths):
        expected = 1000 * document + np.arange(length, dtype=np.float32)
        # All that the one target beyond the window has seen is in the first window, too.
        expected[: 65 if length == 65 else 64] = np.nan
        np.testing.assert_array_equal(sidecar[document], expected)
    assert manifest.scored == sum(max(length - 64, 0) for length in lengths if length != 65)
    assert not job.folder.exists()


def test_a_shard_with_too_few_or_too_many_losses_is_refused(copy: Scene) -> None:
    job = job_of(copy)
    write_shards(job, 2)
    right = ShardReader(job.folder / "00001-of-00002.losses").values
    for values in (right - 1, right + 1):
        write_shard(job.folder, 1, 2, job.settings, [np.zeros(values, dtype=np.float32)])
        with pytest.raises(InputError, match="00001-of-00002.losses: (fewer|more) losses"):
            merge(job, 2)
    assert not Path(f"{copy.prefix}.short_loss.json").exists()
