"""The arithmetic of file descriptors: what a cap of the index cache may cost, and whether that fits under the limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everos_engine.errors import SettingsError

if TYPE_CHECKING:
    from everos_engine.settings import LanceDBSettings, Settings

BASE_DESCRIPTORS = 48
"""Most that the engine holds besides pinned indexes, with two reads of the index at once; a test runs it under
`ulimit -n 64`, searched by hundreds at once, and asserts this bound."""
BASE_READS = 2
READ_DESCRIPTORS = 8
"""Files that each further read at once may have open, amply: two accesses at once, to each of several files of an index and of the data."""
LEAST_LIMIT = 64
"""Below this the engine's own descriptors exceed its hard budget, and no work would ever begin."""
HEADROOM = 2
"""The limit must hold this many ceilings, as in the runbook."""
MIB = 1 << 20
MOST_AUTO_BYTES = 64 * MIB
"""Beyond this the measured latency no longer falls."""


def cap_of(settings: LanceDBSettings, *, limit: int) -> int:
    """The cap in bytes; `auto` is the largest whose ceiling fits ``HEADROOM`` times under ``limit``, at most 64 MiB.

    Raises SettingsError, with the arithmetic, for a cap that pins more descriptors than the limit has room for.
    """
    chosen = settings.index_cache_size_bytes
    if isinstance(chosen, str):
        room = max(0, limit // HEADROOM - own_of(settings, limit=limit))
        return min(MOST_AUTO_BYTES, int(room / settings.descriptors_per_mebibyte * MIB))
    if settings.descriptor_mode == "pinned":
        _check(settings, chosen, limit)
    return chosen


def check_limit(limit: int) -> None:
    """Raises SettingsError for a limit too low for the engine's own descriptors."""
    if limit < LEAST_LIMIT:
        message = (
            f"RLIMIT_NOFILE is {limit}, and the engine itself needs up to {BASE_DESCRIPTORS} file descriptors: raise "
            f"`ulimit -n` to {LEAST_LIMIT} at least, or to 256 to leave it room"
        )
        raise SettingsError(message)


def reads_of(settings: LanceDBSettings, *, limit: int) -> int:
    """How many reads of the index may run at once: ``concurrent_reads``, or as many as a low ``limit`` has room for beside a writer."""
    return max(1, min(settings.concurrent_reads, (limit - BASE_DESCRIPTORS) // READ_DESCRIPTORS - 1))


def own_of(settings: LanceDBSettings, *, limit: int) -> int:
    """The most descriptors the engine holds besides pinned indexes."""
    return BASE_DESCRIPTORS + READ_DESCRIPTORS * max(0, reads_of(settings, limit=limit) - BASE_READS)


def ceiling_of(settings: Settings, *, cap_bytes: int, pinned: bool, limit: int) -> int:
    """The most descriptors the engine may hold: its own, connections to a service, and what the cap pins where indexes are pinned."""
    lancedb, embedder = settings.lancedb, settings.embedder
    pins = round(cap_bytes / MIB * lancedb.descriptors_per_mebibyte) if pinned else 0
    connections = most_connections(embedder.concurrency) if embedder.kind == "http" else 0
    return own_of(lancedb, limit=limit) + connections + pins


def most_connections(concurrency: int) -> int:
    """Connections to an embedding service: the bound of the client's pool, which ``embed/http.py`` opens."""
    return 2 * concurrency + 2


def _check(settings: LanceDBSettings, cap_bytes: int, limit: int) -> None:
    own = own_of(settings, limit=limit)
    ceiling = own + round(cap_bytes / MIB * settings.descriptors_per_mebibyte)
    if HEADROOM * ceiling <= limit:
        return
    fitting = max(0, int((limit / HEADROOM - own) / settings.descriptors_per_mebibyte * MIB))
    message = (
        f"lancedb.index_cache_size_bytes={cap_bytes} with lancedb.descriptor_mode=pinned needs up to {ceiling} file "
        f"descriptors ({own} of the engine + {cap_bytes / MIB:.1f} MiB x "
        f"{settings.descriptors_per_mebibyte:g} per MiB), and {HEADROOM} times that, {HEADROOM * ceiling}, to be safe; "
        f"RLIMIT_NOFILE is {limit}: lower the cap to {fitting}, set it to `auto`, raise `ulimit -n` to "
        f"{HEADROOM * ceiling}, or use descriptor_mode=reopen, which pins none"
    )
    raise SettingsError(message)
