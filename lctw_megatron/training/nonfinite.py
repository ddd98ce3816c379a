"""A step whose loss or gradient is not finite: which sequences and documents it was, on the screen
and in a file."""

from pathlib import Path
from typing import Any

from lctw_megatron.atomic import write_json
from lctw_megatron.data.loader import TokenLoader
from lctw_megatron.errors import few


class NonFinite(Exception):
    """The loss or the gradient of a step is not finite. No weight was changed, on any rank."""

    def __init__(self, step: int, loss: float, norm: float, rows: list[tuple[int, int]]) -> None:
        """rows: (global rank that saw it, row of the global batch) of every sequence whose loss is
        not finite; empty if only the gradient is not."""
        super().__init__(f"step {step}: weighted loss {loss}, gradient norm {norm}")
        self.step, self.loss, self.norm, self.rows = step, loss, norm, rows


def write_nonfinite(loader: TokenLoader, error: NonFinite, run_dir: Path) -> str:
    """Write RUN_DIR/nonfinite_step_N.json and return the line for the screen."""
    samples = describe_samples(loader, error.step)
    chosen = sorted({row for _, row in error.rows}) or list(range(len(samples)))
    path = run_dir / f"nonfinite_step_{error.step:08d}.json"
    details = {
        "step": error.step,
        "weighted_loss": str(error.loss),
        "gradient_norm": str(error.norm),
        "ranks": sorted({rank for rank, _ in error.rows}),
        "sequences": [samples[row] for row in chosen],
    }
    try:
        write_json(path, details)
        written = f"details in {path}"
    except OSError as failure:  # this rank alone must not end by it
        written = f"{path} could not be written ({failure.strerror})"
    where = "; ".join(
        f"{samples[row]['corpus']} sequence {samples[row]['sequence']} (documents "
        f"{few([piece['document'] for piece in samples[row]['pieces']])})"
        for row in chosen[:3]
    )
    more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
    what = f"the loss of {where}{more}" if error.rows else "the gradient, all losses are finite,"
    ranks = few(sorted({rank for rank, _ in error.rows}))
    seen = f" on rank {ranks}" if ranks else ""
    return f"{error}: {what} is not finite{seen}; no weight was changed, {written}"


def describe_samples(loader: TokenLoader, step: int) -> list[dict[str, Any]]:
    """The sequences of a step's global batch, row by row, as plain values."""
    return [
        {
            "sample": traced.sample,
            "corpus": traced.prefix,
            "epoch": traced.epoch,
            "sequence": traced.sequence,
            "pieces": [
                {"document": int(d), "offset": int(o), "length": int(n)}
                for d, o, n in traced.pieces
            ],
        }
        for traced in loader.documents(step)
    ]
