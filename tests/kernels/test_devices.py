"""The abilities of devices: what is asked, what is said where Triton does not work, and what runs then."""

import logging
from types import SimpleNamespace

import pytest
import torch

from d3ds2.kernels import devices
from d3ds2.kernels.devices import KIB, Abilities, abilities, find_device, find_dtype, on_triton

GPU = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Return a function that replaces the first GPU by another one, on which the probe of Triton may fail."""

    def pretend(capability: tuple[int, int], error: Exception | None = None, **properties) -> None:
        facts = {"name": "A card", "major": capability[0], "minor": capability[1], "multi_processor_count": 28}
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**facts | properties))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

        def probe(device):
            if error is not None:
                raise error

        monkeypatch.setattr("d3ds2.kernels.triton_probe.probe", probe)
        monkeypatch.setattr(devices, "_ABILITIES", {})

    return pretend


def test_a_card_on_which_triton_works(card, caplog):
    card((8, 6), shared_memory_per_block_optin=99 * KIB)
    found = abilities(GPU)
    assert found.triton and found.flash and found.backend == "cuda" and not caplog.records
    assert (found.capability, found.shared_memory, found.multiprocessors) == ((8, 6), 99 * KIB, 28)
    assert found.kernels.startswith("Triton ") and found.kernels.endswith(" on A card")


def test_shared_memory_is_known_where_torch_does_not_tell(card):
    card((8, 9))
    assert abilities(GPU).shared_memory == 99 * KIB
    card((13, 0))
    assert abilities(GPU).shared_memory == 48 * KIB  # every card has that


def test_a_compiler_that_is_missing_is_told_once_with_its_remedy(card, caplog):
    card((8, 6), RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable."))
    with caplog.at_level(logging.WARNING):
        found = [abilities(GPU) for _ in range(3)]
    assert not found[0].triton and found[0].flash
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()
    assert "Failed to find C compiler" in caplog.text and "Remedy: install a C compiler" in caplog.text


def test_windows_gets_its_own_remedy(card, monkeypatch):
    monkeypatch.setattr(devices.sys, "platform", "win32")
    card((8, 9), RuntimeError("Failed to find C compiler"))
    assert "pip install -U triton-windows" in abilities(GPU).kernels


def test_triton_that_is_not_installed_is_named(card, monkeypatch):
    monkeypatch.setattr(devices, "HAS_TRITON", False)
    card((8, 9))
    assert "no Triton on A card: pip install triton" in abilities(GPU).kernels


def test_an_old_card_keeps_to_torch(card):
    card((7, 5))
    found = abilities(GPU)
    assert not found.triton and not found.flash and "8.0 or newer, and this one has 7.5" in found.kernels


def test_a_limit_on_registers_holds_on_hopper_alone():
    cards = [Abilities("A card", backend, capability) for backend, capability in (("cuda", (9, 0)), ("cuda", (8, 6)))]
    assert [card.limits_registers for card in (*cards, Abilities("Another", "hip"))] == [True, False, False]


def test_amd_runs_triton_but_not_flash_attention_of_torch(card, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    card((9, 4), shared_memory_per_block=64 * KIB)
    found = abilities(GPU)
    assert (found.backend, found.shared_memory, found.triton, found.flash) == ("hip", 64 * KIB, True, False)


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps", "xpu", "privateuseone"])
def test_other_devices_run_without_triton_and_without_a_warning(kind, caplog):
    found = abilities(torch.device(kind))
    assert not found.triton and not found.flash and found.backend == kind and not caplog.records


def test_a_tensor_on_the_cpu_asks_no_device(monkeypatch):
    monkeypatch.setattr(devices, "_ABILITIES", {})
    assert not on_triton(torch.ones(1)) and not devices._ABILITIES


def test_stages_fit_into_shared_memory():
    card = Abilities("A card", "cuda", shared_memory=99 * KIB)
    assert [card.stages(3, size * KIB) for size in (20, 33, 40, 60, 200, 0)] == [3, 3, 3, 2, 1, 3]
    assert card.stages(3, 40 * KIB, 30 * KIB) == 2


def test_a_device_is_found_by_name(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    for name, kind in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        monkeypatch.setattr(kind, "is_available", lambda: False)
        with pytest.raises(ValueError, match=f"expected a device that is here, got {name}; use cpu"):
            find_device(name)
    assert find_device() == find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_ABILITIES", {torch.device("cuda"): Abilities("A card", "cuda")})
    assert find_device("auto") == torch.device("cuda")


def test_a_process_takes_the_gpu_of_its_number_before_it_asks_anything(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", device)))
    monkeypatch.setattr(devices, "abilities", lambda device: calls.append(("ask", device)))
    assert find_device("auto", 1) == find_device("cuda", 1) == torch.device("cuda", 1)
    assert calls == [("set", torch.device("cuda", 1)), ("ask", torch.device("cuda", 1))] * 2
    assert find_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="expected at most 2 processes here, one for each GPU, got process 3"):
        find_device("cuda", 2)


def test_a_precision_becomes_the_dtype_that_the_device_has(card, caplog):
    card((7, 5))
    assert find_dtype("auto", torch.device("cpu")) == find_dtype("fp32", GPU) == torch.float32
    assert find_dtype("auto", GPU) == find_dtype("fp16", GPU) == torch.float16 and not caplog.records
    assert find_dtype("bf16", GPU) == torch.float16 and "A card cannot compute in bf16" in caplog.text
    card((8, 6))
    assert find_dtype("bf16", GPU) == torch.bfloat16


@pytest.mark.gpu
def test_triton_works_on_this_gpu():
    found = abilities(torch.device("cuda", torch.cuda.current_device()))
    assert found.triton and not found.why_no_triton and found.multiprocessors > 1
