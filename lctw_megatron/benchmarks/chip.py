"""What the GPU can do: by its data sheet, and measured here and now."""

import torch

from lctw_megatron.benchmarks.measure import measure

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 rates of the vendor's data sheets, for the model FLOP utilisation."""


def data_sheet_tflops() -> float:
    """The data sheet's rate of this GPU; NaN for one that is not listed."""
    name = torch.cuda.get_device_name()
    return next((rate for known, rate in PEAK_TFLOPS.items() if known in name), float("nan"))


def matmul_tflops() -> float:
    """TFLOP/s of an 8192-cubed bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cost = measure(lambda: [a @ b for _ in range(10)], torch.device("cuda"), 5)
    return round(10 * 2 * 8192**3 / cost.seconds / 1e12, 1)
