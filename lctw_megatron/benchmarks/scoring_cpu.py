"""Our scorer beside Hugging Face transformers: the same windows, weights, precision and process.

transformers does what a plain script does: a forward over a batch of windows, then the
cross-entropy of all positions. Ours has the same batches to work with, and computes logits where a
target is scored.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lctw_megatron.benchmarks.results import Results
from lctw_megatron.benchmarks.sixteen_bits import weight_changes
from lctw_megatron.config.schema import LayoutConfig, ModelConfig, PrepareConfig
from lctw_megatron.data.token_dataset import TokenDataset
from lctw_megatron.errors import InputError
from lctw_megatron.model.checkpoint import find_checkpoint, read_manifest
from lctw_megatron.model.spec import DTYPES
from lctw_megatron.platform.peak_memory import peak_memory_bytes
from lctw_megatron.platform.world import initialize
from lctw_megatron.scoring.windows import Table, document_windows
from lctw_megatron.training.flops import forward_flops


class Task(NamedTuple):
    """The first ``tokens`` tokens of a document, scored in windows, the first window left out."""

    data: str
    """Prefix of a token dataset whose document is long enough."""
    checkpoint: str
    hf: str
    """The same weights as a Hugging Face folder."""
    window: int = 1024
    stride: int = 512
    tokens: int = 16384
    windows_per_forward: int = 16
    precision: str = "fp32"
    document: int = 0

    def table(self) -> Table:
        """int64 [windows, 5], as WindowPlan.tables."""
        windows = document_windows(self.tokens, self.window, self.stride, score_first_window=False)
        return np.insert(windows, 0, self.document, axis=1)


Losses = Callable[[], Tensor]


def ours(task: Task) -> Losses:
    """Float32 losses of the scored targets, in order, by our scorer."""
    from lctw_megatron.scoring.scorer import Scorer

    world = initialize(LayoutConfig(), seed=0)
    tokens = task.window * task.windows_per_forward
    path = find_checkpoint(task.checkpoint)
    scorer = Scorer(path, LayoutConfig(), task.window, tokens, task.precision, world.device)
    dataset, table = TokenDataset(task.data), task.table()

    def losses() -> Tensor:
        _, found = next(scorer.losses(dataset, [table], bos_id=None))
        assert found is not None
        return torch.from_numpy(found)

    return losses


def transformers(task: Task, windows_per_forward: int | None = None) -> Losses:
    """The same losses by transformers: logits of all positions, cross-entropy of all positions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.hf, dtype=DTYPES[task.precision]).eval()
    dataset, table = TokenDataset(task.data), task.table()
    batch = windows_per_forward or task.windows_per_forward

    @torch.no_grad()
    def losses() -> Tensor:
        result = []
        for begin in range(0, len(table), batch):
            rows = table[begin : begin + batch]
            tokens = torch.zeros((len(rows), task.window + 1), dtype=torch.int64)
            for i, (document, start, end, _, stop) in enumerate(rows.tolist()):
                found = dataset.get(document, start, max(end, stop) - start).astype(np.int64)
                tokens[i, : len(found)] = torch.from_numpy(found)
            logits = model(tokens[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            ).view(len(rows), -1)
            for i, (_, start, _, first, stop) in enumerate(rows.tolist()):
                result.append(loss[i, first - 1 - start : stop - 1 - start])
        return torch.cat(result)

    return losses


def scoring_benchmark(
    hf: Path, text: list[str], output: Path, repeats: int = 2, **sizes: Any
) -> int:
    """Measure a Hugging Face model on the longest document of ``text`` (as tools/preprocess.py
    takes it), print all numbers and write them to ``output``. sizes: fields of Task."""
    from lctw_megatron.conversion.hf_import import import_hf
    from lctw_megatron.data.preprocessing.preprocess import preprocess

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, prefix = Path(folder) / "checkpoint", f"{folder}/text"
        import_hf(hf, checkpoint, log=lambda _: None)
        preprocess(PrepareConfig(inputs=text, output_prefix=prefix, tokenizer=str(hf)))
        lengths = TokenDataset(prefix).lengths
        task = Task(prefix, str(checkpoint), str(hf), document=int(lengths.argmax()), **sizes)
        if lengths.max() < task.tokens:
            raise InputError(
                f"--text {' '.join(text)}: its longest document has {lengths.max()} tokens, "
                f"{task.tokens} are needed; give a longer one"
            )
        found = measure(task, repeats)
        found["change of weights in 16 bits"] = _sixteen_bits(task)
    found["task"] |= {
        "data": [Path(name).name for name in text], "checkpoint": "imported", "hf": hf.name,
    }  # fmt: skip
    results = Results(output)
    for name, row in found.items():
        results[name] = row
    return 0


def _sixteen_bits(task: Task) -> dict[str, Any]:
    """weight_changes of the targets that have a whole long window before them."""
    short = ours(task)()
    long_window = 4 * task.window
    long = ours(task._replace(window=long_window, stride=long_window // 2))()
    return weight_changes(long[None], short[-len(long) :][None])


def measure(task: Task, repeats: int) -> dict[str, Any]:
    """Everything about one task as plain numbers. Every pass runs in a process of its own, which
    gives its peak memory; the sides are taken in turn."""
    sides: dict[str, tuple[Any, ...]] = {
        "ours": (ours, task),
        "transformers": (transformers, task),
        "transformers, one window at a time": (transformers, task, 1),
    }
    passes: dict[str, list[Pass]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            passes[name].append(_in_a_process(*side))
    read = int((task.table()[:, 2] - task.table()[:, 1]).sum())
    results: dict[str, Any] = {
        "task": task._asdict(),
        "threads": torch.get_num_threads(),
        "tokens read": read,
    }
    for name, found in passes.items():
        seconds = statistics.median(one.seconds for one in found)
        peak = statistics.median(one.peak_bytes for one in found)
        results[name] = {
            "seconds": seconds,
            "tokens per second": read / seconds,
            "peak bytes": peak,
            "speed of ours": seconds / statistics.median(one.seconds for one in passes["ours"]),
            "memory of ours": statistics.median(one.peak_bytes for one in passes["ours"]) / peak,
        }
    model = read_manifest(find_checkpoint(task.checkpoint)).model
    results["FLOPs of transformers / ours"] = _flops_ratio(model, task)
    expected, found_losses = passes["transformers"][0].losses, passes["ours"][0].losses
    results["mean loss"] = float(found_losses.mean(dtype=np.float64))
    results["mean loss of transformers"] = float(expected.mean(dtype=np.float64))
    results["largest difference"] = float(np.abs(found_losses - expected).max())
    results["where our time goes"] = _shares(ours(task))
    return results


class Pass(NamedTuple):
    """One pass over the windows in a process of its own."""

    seconds: float
    peak_bytes: int
    """Most memory that the process held, the model and its loading included."""
    losses: NDArray[np.float32]


def _in_a_process(side: Callable[..., Losses], *arguments: Any) -> Pass:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_once, args=(sender, side, arguments))
    process.start()
    sender.close()
    result = Pass(*receiver.recv())
    process.join()
    return result


def _run_once(sender: Connection, side: Callable[..., Losses], arguments: tuple[Any, ...]) -> None:
    losses = side(*arguments)
    start = time.perf_counter()
    found = losses().numpy()
    seconds = time.perf_counter() - start
    sender.send((seconds, peak_memory_bytes(), found))


def _flops_ratio(model: ModelConfig, task: Task) -> float:
    """What leaving out the rows of the head without a target saves."""
    table = task.table()
    lengths = (table[:, 2] - table[:, 1]).tolist()
    scored = int((table[:, 4] - table[:, 3]).sum())
    return forward_flops(model, lengths, sum(lengths)) / forward_flops(model, lengths, scored)


def _shares(losses: Losses) -> dict[str, float]:
    """Share of the time of one pass: products of the layers, attention, head and loss, the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        losses()
    events = {event.key: event for event in record.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    head = sum(e.cpu_time_total for key, e in events.items() if "RowBlockLoss" in key)
    head_products = 0.0
    for event in record.events():
        if event.name in ("aten::mm", "aten::addmm") and _inside(event, "RowBlockLoss"):
            head_products += event.self_cpu_time_total
    products = sum(
        e.self_cpu_time_total for key, e in events.items() if key in ("aten::mm", "aten::addmm")
    )
    attention = sum(e.self_cpu_time_total for key, e in events.items() if "attention" in key)
    shares = {
        "products of the layers": products - head_products,
        "attention": attention,
        "head and loss": head,
    }
    shares["rest"] = total - sum(shares.values())
    return {name: value / total for name, value in shares.items()}


def _inside(event: Any, name: str) -> bool:
    while event is not None:
        if name in event.name:
            return True
        event = event.cpu_parent
    return False
