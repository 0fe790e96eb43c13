"""Peak rates of GPUs by name, from the vendors' datasheets, for model FLOPs utilisation."""

from __future__ import annotations

import re

PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.05,
    "RTX 4090": 165.2,
    "H20": 148.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
    "MI250X": 383.0,
    "MI300X": 1307.4,
    "MI325X": 1307.4,
    "MI355X": 2516.6,
}
"""Words of a GPU's name → dense bf16 matrix products, in TFLOP/s (fp32 sums, no sparsity)."""

PARTS = {"MIG", "LAPTOP", "D", "MAX", "Q"}
"""Words of a name that mean a slice or a slower kind of a GPU in the table."""


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense bf16 peak in FLOP/s; None for one that the table does not have.

    Whole words of the name count, and of several entries the one with most words: an "H100 NVL" is no "H100", and a
    "GB200" no "B200".

    device_name: as `torch.cuda.get_device_name` says, such as "NVIDIA H100 80GB HBM3"
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if words & PARTS:
        return None
    fitting = [name for name in PEAK_TFLOPS if set(name.upper().split()) <= words]
    return PEAK_TFLOPS[max(fitting, key=lambda name: len(name.split()))] * 1e12 if fitting else None
