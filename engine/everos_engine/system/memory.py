"""Return memory to the system, so that a long-lived process holds no more than it uses."""

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
"""One heap for all threads, not eight for each core with separate holes. No thread keeps freed blocks for itself
(0.2 MiB each, which no trim returns). Larger blocks are mapped one by one, and unmapped when freed. The heap's free
end is returned. Names and units are those of the GNU C Library manual, "Memory Allocation Tunables"."""

PR_SET_THP_DISABLE = 41
"""Of prctl(2), from linux/prctl.h."""


def tuned(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the environment in which a process returns memory. None if it is that already, or libc is not glibc.

    The tunables that a user has set stay.
    """
    if not _is_glibc():
        return None
    given = environment.get(VARIABLE, "")
    names = {setting.partition("=")[0] for setting in given.split(":")}
    missing = [f"{name}={value}" for name, value in TUNABLES.items() if name not in names]
    return {**environment, VARIABLE: ":".join(filter(None, [given, *missing]))} if missing else None


def restart_tuned(environment: Mapping[str, str]) -> None:
    """Start this program again in the same process, tuned. glibc reads its tunables only before a program begins.

    Returns if that is not needed. It is for a separate process, before anything else is done in it. Nothing is closed
    or flushed, and descriptors stay open as after any exec. Its pages are small from here on.
    """
    small_pages()
    again = tuned(environment)
    if again is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], again)  # noqa: S606 - this very program


def small_pages() -> bool:
    """Use no huge pages in this process. A huge page holds 2 MiB for the first byte asked of it, and takes holes back.

    Returns False if the kernel is not Linux, or has none. An exec keeps it.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0


def trim() -> bool:
    """Return the free pages inside glibc's heap to the system. It takes 6 ms for 50 MiB. False if libc is not glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return False
    libc.malloc_trim(0)
    return True


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError, AttributeError):  # another libc, another system
        return False
