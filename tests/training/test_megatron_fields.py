"""Fields of megatron-core's configs act, and leave losses and weights what they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lctw_megatron.config.schema import RunConfig
from lctw_megatron.errors import InputError
from lctw_megatron.training.loop import Trainer
from tests.distributed import run_distributed
from tests.training.layouts import gather, make_data, make_run, shards

# Buckets smaller than a layer: with one bucket there would be nothing to overlap.
OVERLAP = {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "CP2": {"context": 2},
    "PP2+VPP2": {"pipeline": 2, "virtual_pipeline": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("megatron"))


def run_of(data: str, folder: str, layout: dict[str, Any], **megatron: Any) -> RunConfig:
    return make_run(data, folder, layout, "pack", "dense", "self", megatron=megatron)


def trained(data: str, folder: str, names: list[str]) -> list[dict[str, Any]]:
    """Every layout without and with overlap: metrics of three steps, held-out losses between them,
    and the weights that a checkpoint would hold."""
    answers = []
    for name in names:
        layout = LAYOUTS[name]
        for megatron in ({}, OVERLAP):
            trainer = Trainer(run_of(data, f"{folder}/{name}{len(megatron)}", layout, **megatron))
            try:
                metrics = []
                for step in range(3):
                    metrics.append(trainer.stepper.step(step, list(trainer.loader.step(step))))
                    if step == 1:
                        metrics.append(trainer.evaluate())
                buckets = sum(len(b.buckets) for c in trainer.wrapped for b in c.buffers)
                trainer.save(3)
                answers.append(
                    {"metrics": metrics, "weights": shards(trainer.chunks), "buckets": buckets}
                )
            finally:
                trainer.close()
    return answers


@pytest.mark.parametrize(
    "names", [["DP2"], pytest.param(["TP2+SP", "CP2", "PP2+VPP2"], marks=pytest.mark.long)]
)
def test_overlapped_communication_gives_the_same_bits(
    data: str, tmp_path: Path, names: list[str]
) -> None:
    ranks = run_distributed(trained, 2, data, str(tmp_path), names)
    for number, name in enumerate(names):
        plain, overlapped = ([rank[2 * number + i] for rank in ranks] for i in (0, 1))
        assert overlapped[0]["buckets"] > plain[0]["buckets"], name
        for ours, theirs in zip(overlapped[0]["metrics"], plain[0]["metrics"], strict=True):
            # Summed bucket by bucket: in another order.
            norm = ours.pop("grad_norm", 0.0), theirs.pop("grad_norm", 0.0)
            assert norm[0] == pytest.approx(norm[1], rel=1e-6) and ours == theirs, name
        whole = gather([rank["weights"] for rank in plain])
        for parameter, weight in gather([rank["weights"] for rank in overlapped]).items():
            np.testing.assert_array_equal(weight, whole[parameter], err_msg=f"{name} {parameter}")


def test_fields_of_the_optimizer_act(data: str, tmp_path: Path) -> None:
    trainer = Trainer(run_of(data, str(tmp_path), {}, optimizer={"apply_wd_to_qk_layernorm": True}))
    try:
        decayed = [g for g in trainer.optimizer.param_groups if g["wd_mult"]]
        # Matrices, and of the vectors the norms of queries and keys: 2 a layer, 8 wide.
        assert sum(p.numel() == 8 for g in decayed for p in g["params"]) == 8
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"apply_rope_fusion": True}, "needs TransformerEngine's layers"),
        ({"cp_comm_type": "p2p"}, "needs TransformerEngine's layers"),
        ({"overlap_p2p_comm_warmup_flush": True}, "is refused by megatron-core"),
    ],
)
def test_what_this_run_cannot_do_is_one_line_at_its_start(
    data: str, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(run_of(data, str(tmp_path), {}, transformer=fields))
