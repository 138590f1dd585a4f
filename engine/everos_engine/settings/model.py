"""The settings: their names, types, defaults, bounds and descriptions."""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from everos_engine.errors import SettingsError
from everos_engine.settings import paths

DescriptorMode = Literal["reopen", "pinned"]
Scope = Literal["root", "user"]
Hidden = Literal["whole", "url"]


def setting(
    default: Any,
    doc: str,
    *,
    scope: Scope,
    root_values: tuple[object, ...] = (),
    hidden: Hidden | None = None,
    sent_to: str = "",
    min_: float | None = None,
    max_: float | None = None,
) -> Any:
    """Declare a setting: its default, its line in the settings table, who may set it, and its bounds (inclusive).

    ``scope`` "root" is for what a memory root's own file may set: its content and its limits. "user" is for what says
    where text or keys go, or which file outside the root is opened. A root's file may set it only if the user trusts
    that file, or to one of ``root_values``, which send nothing anywhere. ``hidden`` is "whole" if the value must never
    be shown, and "url" if it may hold a password or a token. ``sent_to`` names the setting with the address that this
    credential is sent to.
    """
    metadata = {
        "doc": doc,
        "scope": scope,
        "root_values": root_values,
        "hidden": hidden,
        "sent_to": sent_to,
        "min": min_,
        "max": max_,
    }
    return field(default=default, repr=hidden is None, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanceDBSettings:
    """The index store."""

    descriptor_mode: DescriptorMode = setting(
        "reopen",
        "`reopen` opens index files for each read and pins no descriptor. `pinned` keeps them open, bounded by the cap.",
        scope="root",
    )
    index_cache_size_bytes: int | Literal["auto"] = setting(
        16 << 20,
        "Cap of the LanceDB index cache. Sizes such as `8MB` are accepted, and `auto` takes what fits under `ulimit -n`.",
        min_=0,
        scope="root",
    )
    descriptors_per_mebibyte: float = setting(
        110.0,
        "Descriptors that one MiB of index cache pins in mode `pinned`. `everos-engine fds calibrate` measures it.",
        min_=1,
        scope="root",
    )
    session_most_bytes: int = setting(
        32 << 20,
        "Bytes in the Session's caches, metadata too, above which it is rotated. Sizes are accepted.",
        min_=0,
        scope="root",
    )
    soft_budget_share: float = setting(
        0.5,
        "Share of the descriptor limit above which the Session is rotated and the worker slows down.",
        min_=0.1,
        max_=0.95,
        scope="root",
    )
    hard_budget_share: float = setting(
        0.8, "Share of the descriptor limit above which new work waits.", min_=0.1, max_=1, scope="root"
    )
    history_file: str = setting(
        "", "File to which the descriptor guard appends one JSON line a second. Empty: none.", scope="user"
    )
    concurrent_reads: int = setting(
        4,
        "Maximum of parallel reads of the index. Each has its files open meanwhile, and further reads wait.",
        min_=1,
        scope="root",
    )
    read_deadline_seconds: float = setting(30.0, "Longest one read of the index may take.", min_=0.1, scope="root")
    write_deadline_seconds: float = setting(
        120.0,
        "Longest one commit may take before its outcome counts as unknown and it is done again.",
        min_=1,
        scope="root",
    )
    optimize_after_commits: int = setting(40, "Commits to a table before it is optimized.", min_=1, scope="root")
    optimize_after_rows: int = setting(5000, "Rows written to a table before it is optimized.", min_=1, scope="root")
    optimize_after_share: float = setting(
        0.2,
        "Rows written to a table, as a share of those its indexes cover, before it is optimized.",
        min_=0.01,
        scope="root",
    )
    optimize_idle_seconds: float = setting(
        5.0, "Quiet time after the last commit before a pending optimize runs.", min_=0, scope="root"
    )
    keep_versions_seconds: float = setting(
        600.0,
        "Age before an old table version is pruned. A reader may hold one this long. A table at rest has no old version "
        "1.25 times this long after the last write to it.",
        min_=60,
        scope="root",
    )
    erase_after_hours: float = setting(
        24.0,
        "Time after which a changed table is written again without its deleted rows. 0: never.",
        min_=0,
        scope="root",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderSettings:
    """The source of vectors."""

    kind: Literal["local", "http", "none"] = setting(
        "local",
        "`local` (offline, ships its weights), `http` (OpenAI-compatible service) or `none` (text search only).",
        scope="user",
        root_values=("local", "none"),
    )
    url: str = setting(
        "",
        "Base URL of the service, with or without `/embeddings` at its end (kind `http`).",
        scope="user",
        hidden="url",
    )
    model: str = setting("", "Model name sent to the service (kind `http`).", scope="user")
    api_key: str = setting(
        "", "Bearer token for the service. It is never logged.", scope="user", hidden="whole", sent_to="embedder.url"
    )
    dimension: int = setting(
        0, "Width that the service must answer with. 0 accepts the width of its first answer.", min_=0, scope="root"
    )
    batch_size: int = setting(64, "Most texts in one call.", min_=1, max_=2048, scope="root")
    concurrency: int = setting(
        8,
        "Maximum of calls in flight. Suspected texts have up to three quarters as many in addition.",
        min_=1,
        max_=64,
        scope="root",
    )
    calls_per_second: float = setting(
        0.0, "Maximum of calls that begin in a second. 0: no limit.", min_=0, scope="user"
    )
    max_characters: int = setting(
        32_000,
        "Longest text sent to a service. The vector of a longer one is made from its beginning.",
        min_=1,
        scope="root",
    )
    deadline_seconds: float = setting(30.0, "Longest one call may take.", min_=0.1, scope="root")
    hedge_seconds: float = setting(
        2.0,
        "A call with several texts that takes longer is split, so that one slow text cannot hold up the others.",
        min_=0.05,
        scope="root",
    )
    outage_probe_seconds: float = setting(
        1.0,
        "First delay before a service that is down is asked again. It doubles up to `outage_probe_max_seconds`.",
        min_=0.01,
        scope="root",
    )
    outage_probe_max_seconds: float = setting(30.0, "Longest delay between two such probes.", min_=0.01, scope="root")
    outage_patience_seconds: float = setting(
        60.0,
        "How long `sync`, `fix` and `settle` wait for a service that is down. The changes continue to wait.",
        min_=0,
        scope="root",
    )
    cache_max_bytes: int = setting(
        2 << 30, "Size of the embedding cache before the least recently used are dropped.", min_=0, scope="root"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteSettings:
    """Plain markdown as a separate kind."""

    globs: tuple[str, ...] = setting(
        (), "Globs, relative to the root, of plain markdown indexed as `note`. Empty turns the kind off.", scope="root"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """How changes are noticed between the full scans."""

    mode: Literal["auto", "events", "poll", "off"] = setting(
        "auto",
        "`events` listens for file events. `poll` scans every `watch.poll_interval_seconds` instead. `auto` listens, "
        "and also polls if events do not report every change. `off` leaves all to the full scans.",
        scope="root",
    )
    debounce_milliseconds: int = setting(
        200, "Longest time events are gathered before they are recorded.", min_=1, scope="root"
    )
    poll_interval_seconds: float = setting(
        5.0, "Time between full scans if events are not reliable.", min_=0.05, scope="root"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """Where the memory is."""

    root: Path = setting(Path("~/.everos"), "The memory root. `EVEROS_ROOT` and `--root` set it too.", scope="user")

    index_access: Literal["owner", "group"] = setting(
        "owner",
        "Who may read the index: the user that the engine runs as, or its group too. Only the owner may write.",
        scope="user",
    )

    def __post_init__(self) -> None:
        """Make the root absolute and resolve links, so that it stays the same if a link is moved."""
        object.__setattr__(self, "root", Path(os.path.realpath(os.path.expanduser(self.root))))
        try:
            os.fsencode(self.root).decode("utf-8")
        except UnicodeDecodeError:
            raise SettingsError(
                f"memory.root={os.fspath(self.root)!r}: this path is not UTF-8, and the index cannot be opened below it: "
                "rename the directory"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. Build one with `load`, or directly in tests."""

    memory: MemorySettings = field(default_factory=MemorySettings)
    lancedb: LanceDBSettings = field(default_factory=LanceDBSettings)
    embedder: EmbedderSettings = field(default_factory=EmbedderSettings)
    note: NoteSettings = field(default_factory=NoteSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)

    file_deadline_seconds: float = setting(
        30.0,
        "How long one look at a file or directory may take. One that takes longer (a hung network file system, a file that is only in the cloud) is left, named, and tried again later.",
        min_=0.05,
        scope="root",
    )
    scan_interval_seconds: float = setting(30.0, "Time between full scans of the tree.", min_=0.05, scope="root")
    worker_batch_size: int = setting(50, "Changes claimed together. It grows with the backlog.", min_=1, scope="root")
    worker_batch_max: int = setting(500, "Maximum of changes claimed together.", min_=1, scope="root")
    worker_max_retry: int = setting(
        3, "Attempts again after a transient failure, before the change is dead-lettered.", min_=0, scope="root"
    )
    worker_poll_interval_seconds: float = setting(
        1.0,
        "Time between looks for changes queued by other processes, in case a wake-up is lost.",
        min_=0.01,
        scope="root",
    )
    worker_retry_backoff_seconds: float = setting(
        2.0, "First delay after a transient failure. It doubles with each attempt.", min_=0, scope="root"
    )
    worker_retry_backoff_max_seconds: float = setting(
        300.0, "Longest delay between two attempts.", min_=0, scope="root"
    )
    settle_milliseconds: int = setting(
        250,
        "Least time between two indexings of one file, and the age a file must have before it is believed to have "
        "lost its structure, half of its entries or all that it held: it may still be being written.",
        min_=0,
        scope="root",
    )
    audit_interval_hours: float = setting(
        24.0,
        "Time in which every file is read again and compared by content, spread evenly. 0: never.",
        min_=0,
        scope="root",
    )
    brake_ratio: float = setting(
        0.3,
        "Share of the known files that may vanish within a minute. More are held until `release`. 1 never holds.",
        min_=0,
        max_=1,
        scope="root",
    )
    brake_least: int = setting(
        20, "This many files may always vanish within a minute, at any share.", min_=0, scope="root"
    )
    max_file_bytes: int = setting(16 << 20, "Largest markdown file that is indexed.", min_=1, scope="root")
    shutdown_grace_seconds: float = setting(
        10.0, "Time a graceful stop may take to finish what is held.", min_=0, scope="root"
    )
    lock_wait_seconds: float = setting(
        600.0,
        "Longest time a command or a starting engine waits for another command that works on the same root.",
        min_=0,
        scope="root",
    )
    log_format: Literal["auto", "text", "json"] = setting(
        "auto", "`auto` shows a status line on a terminal, else text lines.", scope="root"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting(
        "INFO", "Least level that is logged.", scope="root"
    )

    @property
    def root(self) -> Path:
        """Return the memory root, absolute, with links resolved."""
        return self.memory.root

    @property
    def index_directory(self) -> Path:
        """Return the folder of everything that the engine writes."""
        return self.root / paths.INDEX_DIRECTORY

    @property
    def engine_directory(self) -> Path:
        """Return the folder of our SQLite files, locks and sockets."""
        return self.index_directory / paths.ENGINE_DIRECTORY

    @property
    def engine_database(self) -> Path:
        """Return the path of the SQLite file that holds the queue."""
        return self.engine_directory / paths.ENGINE_DATABASE

    @property
    def embeddings_database(self) -> Path:
        """Return the path of the embedding cache."""
        return self.engine_directory / paths.EMBEDDINGS_DATABASE

    @property
    def engine_lock(self) -> Path:
        """Return the path of the lock that a running engine holds."""
        return self.engine_directory / paths.ENGINE_LOCK

    @property
    def control_socket(self) -> Path:
        """Return the path at which a running engine answers questions."""
        return self.engine_directory / paths.CONTROL_SOCKET

    @property
    def wake_socket(self) -> Path:
        """Return the path at which a running engine is woken when another process queues changes."""
        return self.engine_directory / paths.WAKE_SOCKET

    @property
    def lancedb_directory(self) -> Path:
        """Return the folder of the LanceDB tables, `<kind>.lance` each."""
        return self.index_directory / paths.LANCEDB_DIRECTORY


def fields_of(cls: type, prefix: str) -> list[tuple[str, dataclasses.Field[Any], Any]]:
    """Return (dotted name, field, type) of each setting in ``cls``, with ``prefix`` before each name."""
    hints = get_type_hints(cls)
    found: list[tuple[str, dataclasses.Field[Any], Any]] = []
    for fld in dataclasses.fields(cls):
        hint = hints[fld.name]
        if dataclasses.is_dataclass(hint):
            found += fields_of(typing.cast("type", hint), f"{prefix}{fld.name}.")
        else:
            found.append((prefix + fld.name, fld, hint))
    return found
