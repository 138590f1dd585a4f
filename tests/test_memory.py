"""What the allocator holds, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from everos_engine.system import memory

PROGRAM = """
import ctypes, os, sys, threading
from everos_engine.system import memory
if sys.argv[1] == "again":
    memory.restart_tuned(os.environ)

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Info
small_pages = libc.prctl(42, *map(ctypes.c_ulong, (0, 0, 0, 0)))  # PR_GET_THP_DISABLE
together, end = threading.Barrier(5), threading.Event()

def use_and_free():
    for size in range(24, 1032, 16):
        for block in [libc.malloc(size) for _ in range(7)]:
            libc.free(block)
    together.wait()
    end.wait()

threads = [threading.Thread(target=use_and_free) for _ in range(4)]
before = libc.mallinfo2().uordblks
for thread in threads:
    thread.start()
together.wait()
print(os.getpid(), libc.mallinfo2().uordblks - before, small_pages, *sys.argv[2:], flush=True)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
end.set()
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


def run(word: str) -> tuple[int, list[str], int]:
    """The bytes that threads keep of what they freed, what the program is given, and its heaps."""
    environment = {name: value for name, value in os.environ.items() if name != memory.VARIABLE}
    command = [sys.executable, "-X", "utf8", "-c", PROGRAM, word, "an argument", "ünï"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment) as process:
        assert process.stdout is not None
        pid, kept, *rest = process.stdout.readline().split()
        heaps = process.stdout.read().count("<heap nr=")
    assert process.returncode == 0
    assert int(pid) == process.pid
    return int(kept), rest, heaps


@pytest.mark.skipif(not IS_GLIBC, reason="the tunables are glibc's")
def test_a_program_begun_again_has_one_heap_and_no_thread_that_keeps_what_it_freed() -> None:
    kept, rest, heaps = run("again")
    assert rest == ["1", "an", "argument", "ünï"], "huge pages are off, and arguments come through"
    assert heaps == 1
    assert kept < 50_000
    kept_by_default, rest, heaps_by_default = run("as it is")
    assert rest[0] == "0"
    assert heaps_by_default > 1
    assert kept_by_default > 100_000


@pytest.mark.skipif(not IS_GLIBC, reason="the tunables are glibc's")
def test_what_a_user_has_tuned_stands_and_a_tuned_program_is_not_begun_again() -> None:
    again = memory.tuned({"A": "1", memory.VARIABLE: "glibc.malloc.arena_max=4:glibc.pthread.rseq=0"})
    assert again is not None
    assert again["A"] == "1"
    settings = again[memory.VARIABLE].split(":")
    assert settings[:2] == ["glibc.malloc.arena_max=4", "glibc.pthread.rseq=0"]
    assert sorted(setting.partition("=")[0] for setting in settings[2:]) == sorted(
        set(memory.TUNABLES) - {"glibc.malloc.arena_max"}
    )
    assert memory.tuned(again) is None
    first = memory.tuned({})
    assert first is not None
    assert memory.tuned(first) is None
