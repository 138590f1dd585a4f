"""Compute how many file descriptors and how much memory the settings may need, and whether that fits."""

from __future__ import annotations

from dataclasses import dataclass

from everos_engine.errors import SettingsError
from everos_engine.settings import LanceDBSettings, Settings
from everos_engine.system.slope import Slope

BASE_DESCRIPTORS = 48
"""The maximum that the engine holds without pinned indexes, with two parallel reads of the index. A test runs it
under `ulimit -n 64` with hundreds of parallel searches, and asserts this bound."""
BASE_READS = 2
READ_DESCRIPTORS = 8
"""The most files that each further parallel read may have open: two accesses for each of several index and data
files."""
MIN_LIMIT = 64
"""Below this limit the engine's own descriptors exceed its hard budget, and no work could begin."""
HEADROOM = 2
"""The limit must hold this many ceilings, as in the runbook."""
MIB = 1 << 20
MIN_SLOPE = 1.0
MIN_CAP_BYTES = MIB
"""The guard never lowers a cap below this, since a smaller cache is useless."""
MAX_AUTO_BYTES = 64 * MIB
"""A larger cache no longer lowers the measured latency."""
OTHERS_DESCRIPTORS = 12
"""What a process holds before the engine opens anything: standard input, output and error, and Trio's. They are part
of ``BASE_DESCRIPTORS``."""
ROOM_DESCRIPTORS = 4
"""The minimum distance between the soft and the hard budget, and between the hard budget and the limit."""

BASE_BYTES = 140 * MIB
"""What a process holds once the engine is imported, for an estimate without one. A running engine measures its own."""
RUNTIME_BYTES = 96 * MIB
"""What the first work adds permanently: LanceDB's threads and code, SQLite's caches, Python's heap. Measured: 83 to
90 MiB."""
MODEL_BYTES = {"local": 176 * MIB, "http": 16 * MIB, "none": 0}
"""The embedder. Measured for the local model: 150 MiB once it is loaded, 21 MiB more while it works."""
SESSION_FACTOR = 1.25
"""The Session's caches may hold this many times their budget, since they are checked once a second, and rotations are
some time apart."""
MIN_SESSION_BYTES = 16 * MIB
WORK_BYTES = 64 * MIB
"""What is being worked on at one moment: changes, searches, a compaction."""
ROW_BYTES = 2048
"""For each row, in addition to its vector: what a search, a compaction or one huge file may hold of a whole table."""
VECTOR_VALUE_BYTES = 4
SOFT_MEMORY_SHARE = 0.9
"""The share of the ceiling of resident memory above which the guard acts."""


@dataclass(frozen=True, slots=True)
class MemoryCeiling:
    """The most memory that an engine may hold resident, in bytes, as the sum of its parts.

    See docs/descriptors.md.
    """

    base: int
    runtime: int
    model: int
    session: int
    work: int

    @property
    def ceiling_bytes(self) -> int:
        """Return the sum."""
        return self.base + self.runtime + self.model + self.session + self.work

    @property
    def soft_bytes(self) -> int:
        """Return the bytes above which the guard rotates, trims and slows down."""
        return int(SOFT_MEMORY_SHARE * self.ceiling_bytes)


def memory_ceiling(
    settings: Settings, *, base_bytes: int = BASE_BYTES, rows: int = 0, dimension: int = 0
) -> MemoryCeiling:
    """Return the ceiling of resident memory for these settings and a number of rows with vectors."""
    return MemoryCeiling(
        base=base_bytes,
        runtime=RUNTIME_BYTES,
        model=MODEL_BYTES[settings.embedder.kind],
        session=max(MIN_SESSION_BYTES, int(SESSION_FACTOR * settings.lancedb.session_most_bytes)),
        work=WORK_BYTES + rows * (ROW_BYTES + VECTOR_VALUE_BYTES * dimension),
    )


def budgets_of(settings: Settings, *, limit: int, others: int = OTHERS_DESCRIPTORS) -> tuple[int, int]:
    """Return the soft and the hard budget of descriptors.

    Both are above what is always open: the engine's own maximum, and the ``others`` that were open before it.
    """
    lancedb = settings.lancedb
    held = ceiling_of(settings, cap_bytes=0, pinned=False, limit=limit) + max(0, others - OTHERS_DESCRIPTORS)
    soft = min(max(int(limit * lancedb.soft_budget_share), held), limit - 2 * ROOM_DESCRIPTORS)
    return soft, max(int(limit * lancedb.hard_budget_share), soft + ROOM_DESCRIPTORS)


def cap_of(settings: LanceDBSettings, *, limit: int, learned: Slope | None = None) -> int:
    """Return the cap in bytes.

    `auto` is the largest whose ceiling fits ``HEADROOM`` times under ``limit``, at most 64 MiB.

    ``learned`` is what an earlier run counted. The setting ``descriptors_per_mebibyte`` is only the first guess.

    Raises SettingsError, with the arithmetic, for a cap that pins more descriptors than the limit has room for.
    """
    chosen = settings.index_cache_size_bytes
    if isinstance(chosen, str):
        room = max(0, limit // HEADROOM - own_of(settings, limit=limit))
        slope = settings.descriptors_per_mebibyte if learned is None else max(MIN_SLOPE, learned.high)
        return min(MAX_AUTO_BYTES, int(room / slope * MIB))
    if settings.descriptor_mode == "pinned":
        _check(settings, chosen, limit)
    return chosen


def fitting_cap(settings: LanceDBSettings, slope: Slope, *, cap_bytes: int, room: int) -> int:
    """Return the cap, lowered if its indexes would not fit into ``room`` descriptors.

    ``slope`` is the counted one. A Session is rotated at its budget, so it never fills a cap that is larger.
    """
    full = min(cap_bytes, settings.session_most_bytes)
    if slope.high * full / MIB <= room:
        return cap_bytes
    return min(cap_bytes, max(MIN_CAP_BYTES, int(room / slope.high * MIB)))


def check_limit(limit: int) -> None:
    """Raise SettingsError for a limit too low for the engine's own descriptors."""
    if limit < MIN_LIMIT:
        raise SettingsError(
            f"RLIMIT_NOFILE is {limit}, and the engine itself needs up to {BASE_DESCRIPTORS} file descriptors: raise "
            f"`ulimit -n` to {MIN_LIMIT} at least, or to 256 to leave it room"
        )


def reads_of(settings: LanceDBSettings, *, limit: int) -> int:
    """Return how many reads of the index may run in parallel.

    It is ``concurrent_reads``, or as many as a low ``limit`` has room for next to a writer.
    """
    return max(1, min(settings.concurrent_reads, (limit - BASE_DESCRIPTORS) // READ_DESCRIPTORS - 1))


def own_of(settings: LanceDBSettings, *, limit: int) -> int:
    """Return the most descriptors that the engine holds without pinned indexes."""
    return BASE_DESCRIPTORS + READ_DESCRIPTORS * max(0, reads_of(settings, limit=limit) - BASE_READS)


def ceiling_of(settings: Settings, *, cap_bytes: int, pinned: bool, limit: int) -> int:
    """Return the most descriptors that the engine may hold.

    They are its own, connections to a service, and what the cap pins if indexes are pinned.
    """
    lancedb, embedder = settings.lancedb, settings.embedder
    pins = round(cap_bytes / MIB * lancedb.descriptors_per_mebibyte) if pinned else 0
    connections = most_connections(embedder.concurrency) if embedder.kind == "http" else 0
    return own_of(lancedb, limit=limit) + connections + pins


def most_connections(concurrency: int) -> int:
    """Return the most connections to an embedding service.

    It is the bound of the client's pool, which ``embed/http.py`` opens.
    """
    return 2 * concurrency + 2


def _check(settings: LanceDBSettings, cap_bytes: int, limit: int) -> None:
    own = own_of(settings, limit=limit)
    ceiling = own + round(cap_bytes / MIB * settings.descriptors_per_mebibyte)
    if HEADROOM * ceiling <= limit:
        return
    fitting = max(0, int((limit / HEADROOM - own) / settings.descriptors_per_mebibyte * MIB))
    raise SettingsError(
        f"lancedb.index_cache_size_bytes={cap_bytes} with lancedb.descriptor_mode=pinned needs up to {ceiling} file "
        f"descriptors ({own} of the engine + {cap_bytes / MIB:.1f} MiB x "
        f"{settings.descriptors_per_mebibyte:g} per MiB), and {HEADROOM} times that, {HEADROOM * ceiling}, to be safe. "
        f"RLIMIT_NOFILE is {limit}: lower the cap to {fitting}, set it to `auto`, raise `ulimit -n` to "
        f"{HEADROOM * ceiling}, or use descriptor_mode=reopen, which pins none"
    )
