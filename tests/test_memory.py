"""What the allocator holds, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ARENAS = """
import ctypes, sys, threading
from everos_engine.system import memory
if sys.argv[1] == "given":
    assert memory.give_back()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(4)

def allocate():
    libc.malloc(1000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


HOLES = """
import ctypes
from everos_engine.system import memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

blocks = [libc.malloc(16_000) for _ in range(4000)]
for block in blocks:
    ctypes.memset(block, 1, 16_000)
top = libc.malloc(16_000)
for block in blocks:
    libc.free(block)
before = resident()
assert memory.trim()
print(before - resident())
"""
IS_GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not IS_GLIBC, reason="no other allocator is asked")
def test_what_is_free_below_a_block_in_use_goes_back_when_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 32 << 20


@pytest.mark.skipif(not IS_GLIBC, reason="arenas are glibc's")
def test_all_threads_share_one_arena_once_it_is_asked_for() -> None:
    def arenas(word: str) -> int:
        done = subprocess.run([sys.executable, "-c", ARENAS, word], capture_output=True, text=True, check=True)
        return done.stdout.count("<heap nr=")

    assert arenas("given") == 1
    assert arenas("kept") > 1
