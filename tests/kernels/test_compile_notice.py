"""Triton's compilations are announced once, those that it reads from disk are not.

There is no GPU here: the hooks are called as Triton calls them, by hand.
"""

import pytest
import torch

from d3ds2.kernels import compile_notice
from d3ds2.kernels.compile_notice import READING_SECONDS, announce_triton

triton = pytest.importorskip("triton")


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(compile_notice.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return now


def make_ready(clock, seconds: float) -> None:
    """Call the hooks that are set, around so many seconds; either may end the compilation by a true answer."""
    hooks, before, after = compile_notice._hooks()
    for name in (before, after):
        hook = getattr(hooks, name)
        assert hook is None or not hook(key="k", repr="kernel", fn=None, compile={}, is_manual_warmup=False)
        clock[0] += seconds


def test_the_first_that_is_compiled_is_announced(clock):
    calls = []
    with announce_triton(lambda: calls.append(1)):
        make_ready(clock, READING_SECONDS / 10)
        assert not calls
        make_ready(clock, 5 * READING_SECONDS)
        make_ready(clock, 5 * READING_SECONDS)
    assert calls == [1]
    hooks, *names = compile_notice._hooks()
    assert [getattr(hooks, name) for name in names] == [None, None]


def test_a_hook_of_another_program_stays(clock, monkeypatch):
    hooks, before, _ = compile_notice._hooks()
    monkeypatch.setattr(hooks, before, print)
    with announce_triton(lambda: None):
        assert getattr(hooks, before) is print
    assert getattr(hooks, before) is print


def test_triton_has_these_hooks():
    hooks, *names = compile_notice._hooks()
    assert all(hasattr(hooks, name) for name in names)
