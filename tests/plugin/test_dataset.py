import json
import pickle

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset

from lctw_megatron.errors import InputError
from lctw_megatron.plugin.dataset import ShortLossGPTDataset, dataset_class
from lctw_megatron.plugin.loss_mask import DEAD
from tests.data.small_data import count_up, write_sidecar, write_tokens
from tests.plugin.scene import SEQUENCE, build, expected_losses, write_corpus

NAN = float("nan")

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("extra_token", [True, False])
@pytest.mark.parametrize("first_window", [True, False])
def test_every_label_has_its_own_short_loss_in_blends_of_many_epochs(
    tmp_path, extra_token, first_window
):
    lengths = np.random.default_rng(1).integers(3, 150, 60).tolist()
    place = write_corpus(tmp_path / "a", lengths, 10_000, score_first_window=first_window)
    place |= write_corpus(tmp_path / "b", lengths[:25], 50_000, score_first_window=first_window)
    prefixes = [str(tmp_path / "a"), str(tmp_path / "b")]
    samples = 400  # about 110 an epoch
    options = {"add_extra_token_to_sequence": extra_token, "eod_mask_loss": True}
    ours, _, _ = build(ShortLossGPTDataset, prefixes, tmp_path, samples, **options)
    theirs, _, _ = build(GPTDataset, prefixes, tmp_path, samples, **options)
    assert len(ours) == len(theirs) >= samples
    compared = scored = misaligned = 0
    for number in range(samples):
        sample, plain = ours[number], theirs[number]
        assert (sample["tokens"] == plain["tokens"]).all()
        assert (sample["labels"] == plain["labels"]).all()
        carried, mask = sample["loss_mask"].numpy(), plain["loss_mask"].numpy()
        text = np.append(plain["tokens"].numpy(), plain["labels"].numpy()[-1])
        if not extra_token:
            text = text[:-1]  # the last label is padding
        expected = np.full(SEQUENCE, NAN, dtype=np.float32)
        expected[: len(text) - 1] = expected_losses(text, place, first_window)
        expected[mask == 0] = DEAD
        compared += SEQUENCE
        scored += int((expected > 0).sum())
        misaligned += int((~((carried == expected) | np.isnan(carried + expected))).sum())
        misaligned += int((np.isnan(carried) != np.isnan(expected)).sum())
    assert misaligned == 0
    assert scored > compared / 3, "too few labels have a short loss for the test to say anything"


def test_padding_and_validation_are_not_scored(tmp_path):
    write_corpus(tmp_path / "a", [40, 90, 33, 70, 61, 20], 1000)
    (tmp_path / "a.short_loss.json").rename(tmp_path / "kept.json")
    with pytest.raises(InputError, match="the sidecar is not finished"):
        build(ShortLossGPTDataset, [str(tmp_path / "a")], tmp_path, 10)
    (tmp_path / "kept.json").rename(tmp_path / "a.short_loss.json")
    training, validation, _ = build(
        ShortLossGPTDataset, [str(tmp_path / "a")], tmp_path, 10,
        drop_last_partial_validation_sequence=False,
    )  # fmt: skip
    assert training.datasets[0][None]["loss_mask"].tolist() == [DEAD] * SEQUENCE
    carried = [validation[n]["loss_mask"].numpy() for n in range(len(validation))]
    assert all((np.isnan(mask) | (mask == DEAD)).all() for mask in carried)
    assert any((mask == DEAD).any() for mask in carried), "the last sequence is padded"


@pytest.mark.parametrize(
    "made_with, named",
    [
        ({"sequence_length": SEQUENCE}, "--sequence-length 32, but the samples of GPTDataset"),
        ({"window": SEQUENCE}, "window 32, but the samples have 32 tokens"),
    ],
)
def test_sidecars_that_do_not_fit_the_samples(tmp_path, made_with, named):
    documents = count_up([100, 90])
    dataset = write_tokens(tmp_path / "a", documents)
    write_sidecar(dataset, [[NAN] * 100, [NAN] * 90], **made_with)
    with pytest.raises(InputError, match=named):
        build(ShortLossGPTDataset, [str(tmp_path / "a")], tmp_path, 4, split="1,0,0")


def test_each_class_checks_its_own_window_and_a_worker_gets_the_same_samples(tmp_path):
    for without in ({"scheme": "uniform"}, {"scheme": "eslm", "keep_fraction": 0.5}):
        assert dataset_class(without) is GPTDataset
    write_corpus(tmp_path / "a", [40, 90, 33, 70, 61, 20], 1000)
    made = json.loads((tmp_path / "a.short_loss.json").read_text())
    scored = {name: made[name] for name in ("window", "stride")}
    right = dataset_class({"scheme": "dense", **scored})
    wrong = dataset_class({"scheme": "dense", **scored, "window": made["window"] + 1})
    for cls in (ShortLossGPTDataset, dataset_class({"scheme": "dense"}), right):
        training, _, _ = build(cls, [str(tmp_path / "a")], tmp_path, 4, split="1,0,0")
        again = pickle.loads(pickle.dumps(training))
        np.testing.assert_array_equal(again[3]["loss_mask"], training[3]["loss_mask"])
    with pytest.raises(InputError, match=f"scored with window {made['window']}, but window"):
        build(wrong, [str(tmp_path / "a")], tmp_path, 4, split="1,0,0")
