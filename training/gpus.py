"""GPUs: their memory, and how fast they multiply bf16 matrices.

The peaks are those of the makers' data sheets, for dense matrices and sums in fp32. A card that is not listed has no
peak here, and so no utilisation is reported for it.
"""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """A kind of GPU."""

    memory_gib: float  # that programs may take, about
    bf16_tflops: float  # 10¹² operations per second; a multiplication and an addition are two
    device_names: str  # regular expression of the whole name that torch gives such a device


GPUS = {
    # NVIDIA, for data centres
    "A10": GPU(22.5, 125, r"NVIDIA A10"),
    "A10G": GPU(22.5, 70, r"NVIDIA A10G"),
    "A30": GPU(24, 165, r"NVIDIA A30"),
    "A40": GPU(45, 149.7, r"NVIDIA A40"),
    "A100": GPU(80, 312, r"NVIDIA A[18]00(-SXM4-80GB| 80GB PCIe)"),
    "A100-40GB": GPU(40, 312, r"NVIDIA A100-(SXM4|PCIE)-40GB"),
    "L4": GPU(22.5, 121, r"NVIDIA L4"),
    "L40": GPU(45, 181, r"NVIDIA L40"),
    "L40S": GPU(45, 362, r"NVIDIA L40S"),
    "H20": GPU(95, 148, r"NVIDIA H20"),
    "H100": GPU(79.5, 989, r"NVIDIA H[18]00( 80GB HBM3)?"),
    "H100-NVL": GPU(93.5, 835, r"NVIDIA H100 NVL"),
    "H100-PCIe": GPU(79.5, 756, r"NVIDIA H100 PCIe"),
    "H200": GPU(140, 989, r"NVIDIA H200"),
    "B200": GPU(179, 2250, r"NVIDIA B200"),
    # NVIDIA, for workstations and games
    "RTX-A6000": GPU(48, 154.8, r"NVIDIA RTX A6000"),
    "RTX-6000-Ada": GPU(48, 364.2, r"NVIDIA RTX 6000 Ada Generation"),
    "RTX-3090": GPU(24, 71, r"NVIDIA GeForce RTX 3090"),
    "RTX-3090-Ti": GPU(24, 80, r"NVIDIA GeForce RTX 3090 Ti"),
    "RTX-4080": GPU(16, 97.5, r"NVIDIA GeForce RTX 4080"),
    "RTX-4090": GPU(24, 165.2, r"NVIDIA GeForce RTX 4090"),
    "RTX-5090": GPU(31.8, 209.5, r"NVIDIA GeForce RTX 5090"),
    # AMD
    "MI210": GPU(64, 181, r"AMD Instinct MI210"),
    "MI300X": GPU(192, 1307.4, r"AMD Instinct MI300X"),
    "MI325X": GPU(256, 1307.4, r"AMD Instinct MI325X"),
}


def find_gpu(device_name: str) -> GPU | None:
    """Return the listed kind of a device, such as "NVIDIA A100-SXM4-80GB"; None if it is not listed.

    A part of a GPU (MIG) and a card for laptops have other names, and are not listed.
    """
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.device_names, device_name)), None)
