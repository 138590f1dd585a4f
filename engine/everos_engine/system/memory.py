"""Return memory to the system, so that a process which runs for months holds no more than it uses."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {
    "glibc.malloc.arena_max": "1",
    "glibc.malloc.tcache_count": "0",
    "glibc.malloc.mmap_threshold": str(32 << 10),
    "glibc.malloc.trim_threshold": str(64 << 10),
}
"""All threads share one heap, instead of eight heaps for each core, each with its own free space. No thread keeps freed
blocks (0.2 MiB each, which no trim returns). Larger blocks are mapped one by one, and unmapped when freed. The free end
of the heap is returned. Names and units are those of the GNU C Library manual, "Memory Allocation Tunables"."""

PR_SET_THP_DISABLE = 41
"""Of prctl(2), from linux/prctl.h."""


def tuned(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return an environment with TUNABLES, or None if it has them already, or libc is not glibc.

    Values that the user has set do not change.
    """
    if not _is_glibc():
        return None
    given = environment.get(VARIABLE, "")
    names = {setting.partition("=")[0] for setting in given.split(":")}
    missing = [f"{name}={value}" for name, value in TUNABLES.items() if name not in names]
    return {**environment, VARIABLE: ":".join(filter(None, [given, *missing]))} if missing else None


def restart_tuned(environment: Mapping[str, str]) -> None:
    """Start this program again in the same process, with TUNABLES.

    glibc reads them only when a program starts. Returns if that is not needed. Call this first in a process of its own:
    nothing is closed or flushed, and descriptors stay open as after any exec. Huge pages are off afterwards.
    """
    small_pages()
    again = tuned(environment)
    if again is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], again)  # noqa: S606 - this program again


def small_pages() -> bool:
    """Use no huge pages in this process.

    One takes 2 MiB for the first byte used, and fills space that was returned. Returns False if the kernel is not
    Linux, or has no huge pages. The setting survives an exec.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0


def trim() -> bool:
    """Return the free pages inside glibc's heap to the system.

    It takes 6 ms for 50 MiB. False if libc is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return False
    libc.malloc_trim(0)
    return True


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError, AttributeError):  # this is another libc or system
        return False
