"""What a program sets before torch is imported, and what it gives back."""

import os
import subprocess
import sys

import pytest

from fmclip import process


class FakeLibrary:
    """A C library that notes what it is asked."""

    def __init__(self) -> None:
        self.calls = []

    def mallopt(self, *arguments):
        self.calls.append(arguments)

    def malloc_trim(self, *arguments):
        self.calls.append(arguments)


@pytest.fixture
def library(monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setattr(process, "_glibc", lambda: fake)
    monkeypatch.setattr(os, "environ", {})
    return fake


def test_threads_sleep_and_share_one_heap_unless_the_environment_says_otherwise(library):
    process.prepare_process()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert library.calls == [(-8, 1)]
    for own in ({"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}):
        os.environ.clear()
        os.environ.update(OMP_WAIT_POLICY="active", **own)
        process.prepare_process()
        assert os.environ["OMP_WAIT_POLICY"] == "active"
        assert len(library.calls) == 1


def test_without_glibc_nothing_is_asked(monkeypatch):
    process._glibc.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    try:
        assert process._glibc() is None
        process.prepare_process()
        process.give_back()
    finally:
        process._glibc.cache_clear()


@pytest.mark.skipif(process._glibc() is None, reason="other C libraries keep nothing of this kind")
def test_freed_memory_goes_back_to_the_system():
    code = """
from fmclip.process import give_back, prepare_process
prepare_process()
import resource
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
pieces = [bytearray(100_000) for _ in range(1000)]
last = pieces.pop()
full = resident()
del pieces[:]
kept = resident()
assert kept > full - 20_000_000, (full, kept)
give_back()
assert resident() < full - 80_000_000, (full, kept, resident())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_preparing_imports_nothing_large():
    code = "import sys, fmclip.process; fmclip.process.prepare_process(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
