"""The table of GPUs."""

import re

import pytest

from training.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX-3090-Ti"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
    ],
)
def test_a_device_is_of_one_kind(device, kind):
    assert find_gpu(device) == GPUS[kind]
    assert [name for name, gpu in GPUS.items() if re.fullmatch(gpu.device_names, device)] == [kind]


@pytest.mark.parametrize(
    "device", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", ""]
)
def test_an_unknown_device_has_no_peak(device):
    assert find_gpu(device) is None
