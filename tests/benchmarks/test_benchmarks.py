"""tools/benchmark.py at sizes where only its answers mean something, not its times."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lctw_megatron.benchmarks import fp8, gpu, scoring_gpu
from lctw_megatron.benchmarks.attention import attention_benchmark
from lctw_megatron.benchmarks.checkpointing import checkpoint_benchmark
from lctw_megatron.benchmarks.cpu import STEP, WEIGHTINGS
from lctw_megatron.benchmarks.full_size import plan, weighted_plan
from lctw_megatron.benchmarks.head import head_benchmark
from lctw_megatron.benchmarks.kernel_times import by_kind, where_time_goes
from lctw_megatron.benchmarks.results import Results
from lctw_megatron.benchmarks.scaling import layouts, of_all_ranks, run_of
from lctw_megatron.benchmarks.scoring_cpu import scoring_benchmark
from lctw_megatron.benchmarks.sixteen_bits import weight_changes
from lctw_megatron.benchmarks.steps import StepBench, step_benchmark
from lctw_megatron.commands import benchmark
from lctw_megatron.config.layout_rules import check_layout
from lctw_megatron.config.schema import LayoutConfig, RunConfig
from lctw_megatron.conversion.hf_import import import_hf
from lctw_megatron.errors import InputError
from lctw_megatron.platform.world import World
from tests.conversion.hf_models import make_model
from tests.distributed import run_distributed
from tests.scoring.scorers import write_corpus
from tests.tokenizer_files import VOCAB_SIZE, hf_folder, real_text  # noqa: F401 (a fixture)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def out_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def small_run() -> RunConfig:
    return RunConfig.model_validate(
        STEP | {"data": {"train": [], "sequence_length": 1024}, "model": STEP["model"] | SMALL}
    )


SMALL = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "vocab_size": 128}


def test_the_loss_the_attention_and_the_sparse_backward() -> None:
    row = head_benchmark(64, 16, 300, CPU, torch.float32, repeats=1)
    assert row["time_ratio"] == row["row_block_seconds"] / row["full_seconds"]
    row = attention_benchmark(128, 4, 2, 8, 3, CPU, torch.float32, repeats=1)
    assert 0 < row["unmasked_share"] < 0.5


def test_steps_are_beside_their_flops() -> None:
    rows = step_benchmark(small_run(), WEIGHTINGS, repeats=1)
    assert list(rows) == list(WEIGHTINGS)
    assert rows["frozen dense"]["flops_ratio"] == 1.0
    assert 1.1 < rows["self-scoring dense"]["flops_ratio"] < 1.6


def what_saving_costs() -> list[tuple[str, dict[str, Any]]]:
    return list(checkpoint_benchmark(small_run(), every=2))


def test_what_saving_costs_on_each_rank() -> None:
    for found in run_distributed(what_saving_costs, 2):
        rows = dict(found)
        assert list(rows) == [
            "first step", "2 steps", "first save", "load", "blocking save",
            "2 steps with an asynchronous save",
        ]  # fmt: skip
        assert all(row["seconds"] > 0 for row in rows.values())
        assert rows["first save"]["gigabytes"] > 0
        blocking, background = list(rows.values())[-2:]
        share = blocking["seconds"] / rows["2 steps"]["seconds"]
        assert blocking["share_of_steps"] == share
        assert background["share_of_steps"] > -1 and background["waited_seconds"] >= 0


def test_what_is_killed_leaves_the_numbers_that_it_had(monkeypatch, tmp_path, capsys) -> None:
    def part(results: dict[str, Any]) -> None:
        """Two numbers."""
        results["one"] = {"seconds": 1.5}
        seen.append((capsys.readouterr().out, json.loads(output.read_text())["one"]))
        raise KeyboardInterrupt

    seen: list[tuple[str, dict[str, Any]]] = []
    output = tmp_path / "found.json"
    monkeypatch.setattr(gpu, "PARTS", {"part": part})
    monkeypatch.setattr(gpu, "capabilities", lambda: Mock(gpu=True, line=lambda: "machine"))
    monkeypatch.setattr(gpu, "matmul_tflops", lambda: 1.0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(KeyboardInterrupt):
        gpu.gpu_benchmark(output, [])
    ((said, kept),) = seen
    assert said.splitlines()[-2:] == ["[part: Two numbers.]", "one: seconds 1.5"]
    assert kept == {"seconds": 1.5}
    # Of several ranks only the first has a say.
    output.unlink()
    Results(output, first_rank=False)["one"] = 1.0
    assert not output.exists() and not capsys.readouterr().out


def test_ranks_step_on_their_parts_of_the_same_sequences() -> None:
    run = small_run().model_copy(update={"layout": LayoutConfig(context=2)})

    def tokens(data_rank: int, data_size: int, context_rank: int, context: int) -> torch.Tensor:
        bench = StepBench.__new__(StepBench)
        bench.run = run.model_copy(update={"layout": LayoutConfig(context=context)})
        bench.world = World(0, 4, CPU, 0, 0, context_rank, data_rank, data_size)
        return torch.cat([batch["tokens"] for batch in bench.batches()])

    whole = tokens(0, 1, 0, 1)
    assert whole.shape == (2, 1024)
    for rank in (0, 1):
        parts = [tokens(rank, 2, context, 2) for context in (0, 1)]
        assert torch.equal(
            torch.cat([parts[0][:, :256], parts[1], parts[0][:, 256:]], 1)[0], whole[rank]
        )


@pytest.mark.parametrize("gpus", [2, 4])
def test_the_layouts_that_are_compared_fit_the_model(gpus: int) -> None:
    for layout in layouts(gpus).values():
        check_layout(run_of(layout, gpus), gpus)


def test_of_8b_as_little_is_recomputed_as_fits_the_gpus() -> None:
    found = {gib: [run for _, run in plan(4, gib * 2**30)] for gib in (40, 80, 141)}
    assert [run is None for run in found[40]].count(True) == 7
    recomputed = {
        gib: [run.layout.recompute if run else "does not fit" for run in found[gib]]
        for gib in (80, 141)
    }
    assert recomputed[80] == ["mlp", "mlp", "does not fit", "mlp"] + [
        "full", "full", "does not fit",
    ]  # fmt: skip
    assert recomputed[141] == ["none"] * 4 + ["mlp", "mlp", "full"]
    name, run = weighted_plan(4, 141 * 2**30)
    assert name == "8B at 32,768 tokens, TP2xCP2, recompute none"
    assert run is not None and run.layout.tensor == run.layout.context == 2


def test_the_help_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["gpu", "--help"])
    parts = capsys.readouterr().out.partition("parts: ")[2].partition(";")[0].split()
    assert sorted(parts) == sorted(gpu.PARTS)


def test_what_a_scorer_reads_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_gpu, "WINDOW", 64)
    monkeypatch.setattr(scoring_gpu, "STRIDE", 48)
    monkeypatch.setattr(scoring_gpu, "data_sheet_tflops", lambda: 2.0)
    rows = scoring_gpu.scorer_speed(small_run().model, [64, 128], number=4)
    assert list(rows) == [64, 128]
    for row in rows.values():
        assert row["tokens_per_second"] > 0 and row["tflops_per_second"] == 2 * row["utilisation"]


def test_scoring_beside_transformers(hf_folder: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    model = make_model("llama", tmp_path / "hf", vocab_size=VOCAB_SIZE, max_position_embeddings=512)
    for file in hf_folder.iterdir():
        shutil.copy(file, model)
    text, output = tmp_path / "long.txt", tmp_path / "scoring.json"
    text.write_text(real_text())
    sizes = {"window": 64, "stride": 48, "tokens": 1000, "windows_per_forward": 4, "repeats": 1}
    assert scoring_benchmark(model, [str(text)], output, **sizes) == 0
    found = json.loads(output.read_text())
    # Ours and transformers' losses of the same targets, the tolerance of golden scores.
    assert found["largest difference"] < 1e-4
    assert found["FLOPs of transformers / ours"] > 1
    assert set(found["where our time goes"]) > {"attention", "head and loss"}
    assert str(tmp_path) not in output.read_text()


def test_what_sixteen_bits_change() -> None:
    """0.5 - 0.25 is a step of no encoding but the exact float16's."""
    long_loss = torch.tensor([[0.25, 1.0, 3.0, 0.001]])
    short_loss = torch.tensor([[0.5, 1.0004, 2.0, 0.0011]])
    changes = weight_changes(long_loss, short_loss)
    assert set(changes) == {"linear", "logarithmic", "float16"}
    assert changes["float16"]["dense"]["largest"] > 1e-4
    exact = weight_changes(long_loss, long_loss.clone().fill_(0.5))
    assert exact["float16"]["dense"]["largest"] == 0.0


def test_fp8_moves_scores_by_more_than_bf16_does(tmp_path: Path) -> None:
    hf = make_model("llama", tmp_path / "hf", vocab_size=96, max_position_embeddings=256)
    import_hf(hf, tmp_path / "checkpoint", log=lambda _: None)
    dataset = write_corpus(tmp_path / "text", [300, 40, 200])
    arguments = tmp_path / "checkpoint", dataset.prefix, tmp_path / "fp8.json", 128, 32
    assert fp8.fp8_benchmark(*arguments, sequences=3) == 0
    found = json.loads((tmp_path / "fp8.json").read_text())
    # The first 32 tokens are the first window, whose 31 targets have the same context in both.
    assert found["float32"]["targets"] == 3 * (128 - 31)
    by_bf16 = found["bf16 beside float32"]
    for name in fp8.SCALES:
        moved = found[f"{name}, beside bf16"]
        # FP8 keeps 4 bits of a number and bf16 8; neither may move a score beyond its own size.
        assert 2 * by_bf16["d, mean"] < moved["d, mean"] < found["float32"]["mean |d|"]
        assert by_bf16["d, correlation"] > moved["d, correlation"] > 0.8
    with pytest.raises(InputError, match="--window 128"):
        fp8.fp8_benchmark(*arguments[:4], 128, 1)
    with pytest.raises(InputError, match="longest document has 300 tokens"):
        fp8.text_of(dataset, 300, 1)


@pytest.mark.parametrize("by_row", [False, True])
def test_linear_layers_multiply_in_fp8_only_meanwhile(by_row: bool) -> None:
    model = small_run().model
    chunks = fp8.build(model, 64, "bf16")
    scoring_gpu.draw_weights(chunks, model)
    tokens = torch.randint(128, (2, 65), generator=torch.Generator().manual_seed(0))
    before = fp8.both_losses(chunks, tokens, 16)
    with fp8.fp8_linears(chunks, by_row):
        meanwhile = fp8.both_losses(chunks, tokens, 16)
    after = fp8.both_losses(chunks, tokens, 16)
    for one, other, again in zip(before, meanwhile, after, strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)
    # A row that is 100,000 times smaller than another keeps its bits where it has its own scale.
    values = torch.randn(2, 64).mul(torch.tensor([[1.0], [1e-5]]))
    codes, scales = fp8.quantise(values, by_row)
    error = (codes.float() * scales - values).abs().amax(1) / values.abs().amax(1)
    assert error[0] < 2**-4 and (error[1] < 2**-4) == by_row


def test_how_far_scores_and_weights_are_moved() -> None:
    long_loss = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    before = long_loss, long_loss + torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    after = long_loss, long_loss + torch.tensor([[0.0, 1.0, 2.0, 5.0, 2.0]])
    row = fp8.moves(before, after)
    assert row["d, largest"] == 2.0 and row["d, mean"] == pytest.approx(0.8)
    # n / sum of |d| is 1/2: a weight moves by half of what a score does.
    assert row["dense, largest"] == 1.0 and row["dense 0.75, largest"] == 0.25
    assert row["sparse, share of the kept that change"] == 1.0
    assert row["log p, largest"] == 0.0 and row["log p, correlation"] == pytest.approx(1.0)


def test_a_profile_is_summed_up_by_kind_and_by_what_is_covered() -> None:
    spans = [(2.0, 5.0, "cudnn_sdpa_flash_bprop"), (0.0, 1.0, "nvjet_sm90_tst"), (4.0, 6.0, "silu")]
    assert by_kind(spans) == {"attention": 3.0, "matrix products": 1.0, "small kernels": 2.0}
    spans.append((5.5, 10.0, "ncclDevKernel_AllGather_RING_LL"))
    found = where_time_goes(spans)
    assert (found["idle share"], found["communication alone"]) == (0.1, 0.4)
    assert found["kinds"]["communication"]["share"] == 0.45


def profiles_of_ranks() -> dict[str, list[float]]:
    rank = torch.distributed.get_rank()
    spans = [
        (0.0, 1000.0 * (rank + 1), "flash_fwd"),
        (2000.0, 3000.0, "nvjet"),
        (2000.0, 4e3, "nccl"),
    ]
    return of_all_ranks(where_time_goes(spans))


def test_every_rank_s_waiting_is_told() -> None:
    for found in run_distributed(profiles_of_ranks, 2):
        assert found["communication alone"] == [0.25, 0.25]
        assert found["attention ms"] == [1.0, 2.0] and found["matrix products ms"] == [1.0, 1.0]
