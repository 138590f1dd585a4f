"""Frozen settings: defaults < user's TOML < the root's TOML < ``EVEROS_*`` environment < command line flags."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import unquote

from everos_engine import trust
from everos_engine.errors import SettingsError, clipped, quoted
from everos_engine.spelling import nearest

N = TypeVar("N", int, float)
ENVIRONMENT_PREFIX = "EVEROS_"
ROOT_SETTINGS_FILE = "everos-engine.toml"
SHARED = {"MEMORY"}
"""Sections in which other programs have settings too."""
_UNITS = {"": 1, "B": 1, "KB": 1 << 10, "KIB": 1 << 10, "MB": 1 << 20, "MIB": 1 << 20, "GB": 1 << 30, "GIB": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)(?:\s*([A-Za-z]+))?\s*")
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}

DescriptorMode = Literal["reopen", "pinned"]
REFUSED = {
    "lancedb.metadata_cache_size_bytes": (
        "must not be set: the metadata cache holds parsed manifests and fragment statistics and has no effect on the "
        "number of file descriptors; capping it only repeats parsing. Remove it, and set lancedb.index_cache_size_bytes"
    ),
}


Scope = Literal["root", "user"]
Hidden = Literal["whole", "url"]
MASK = "********"
MIN_SECRET_CHARACTERS = 4
"""A shorter part of an address is not masked in a text, because it is part of too many words."""


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
    def engine_directory(self) -> Path:
        """Return the folder of our SQLite files, locks and sockets."""
        return self.root / ".index" / "engine"

    @property
    def control_socket(self) -> Path:
        """Return the path at which a running engine answers questions."""
        return self.engine_directory / "control.sock"

    @property
    def lancedb_directory(self) -> Path:
        """Return the folder of the LanceDB tables, `<kind>.lance` each."""
        return self.root / ".index" / "lancedb"


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    user_file: Path | None = None,
    faults: list[str] | None = None,
) -> Settings:
    """Return the settings from all sources. ``flags`` has dotted names (``{"memory.root": "x"}``).

    ``user_file`` defaults to ``$XDG_CONFIG_HOME/everos-engine/settings.toml``.
    Raises SettingsError for an unknown name, a value of the wrong type or out of bounds, or an unreadable file.
    With ``faults`` nothing is raised. Each such message is appended there, and its value is left out.
    """
    refuse = _raise if faults is None else faults.append
    env = os.environ if environment is None else environment
    user_path = user_file or _user_file(env)
    by_user, root = _by_user(flags, env, user_path, refuse)
    content = _content(root / ROOT_SETTINGS_FILE, refuse)
    by_root = _parse(root / ROOT_SETTINGS_FILE, content, refuse)
    if "memory.root" in by_root:
        _, source = by_root.pop("memory.root")
        refuse(f"{source}: a root's own settings cannot move it: remove memory.root from there")
    for name, reason in REFUSED.items():
        for values in (by_root, *by_user):
            if name in values:
                refuse(f"{values.pop(name)[1]}: {name} {reason}")
    asked = restricted(by_root)
    if asked and not trust.is_trusted(root, content, env):
        refuse(_untrusted(root, asked, user_path))
        by_root = {name: value for name, value in by_root.items() if name not in asked}
    from_file, from_environment, from_flags = by_user
    values = {**from_file, **by_root, **from_environment, **from_flags}
    unknown = dict(values)
    settings = _build(Settings, unknown, "", refuse)
    for name in sorted(unknown):
        refuse(f"{values[name][1]}: there is no setting {quoted(name)}: {_suggestion(name)}")
    _check_together(settings, refuse)
    _check_credentials(settings, values, by_root, by_user, refuse)
    return typing.cast("Settings", settings)


def _raise(message: str) -> None:
    raise SettingsError(message)


def _suggestion(name: str) -> str:
    """Return what to do about a name that no setting has."""
    known = [known for known, _, _ in _fields(Settings, "")]
    meant = nearest(name, known) or next((one for one in known if one.rpartition(".")[2] == name), None)
    listed = "`everos-engine settings` lists them all"
    return listed if meant is None else f"did you mean {meant!r}? {listed}"


def root_file(
    flags: Mapping[str, object] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    user_file: Path | None = None,
) -> tuple[Path, bytes, dict[str, object]]:
    """Return the memory root, the content of its settings file, and what that sets that needs trust, secrets masked."""
    env = os.environ if environment is None else environment
    _, root = _by_user(flags, env, user_file or _user_file(env), _raise)
    content = _content(root / ROOT_SETTINGS_FILE, _raise)
    by_root = _parse(root / ROOT_SETTINGS_FILE, content, _raise)
    known = {name: fld for name, fld, _ in _fields(Settings, "")}
    return root, content, {name: _masked(known[name], by_root[name][0]) for name in restricted(by_root)}


def restricted(values: Mapping[str, tuple[object, str]]) -> list[str]:
    """Return which of a root's own settings it may set only when the user trusts its file."""
    known = {name: fld.metadata for name, fld, _ in _fields(Settings, "")}
    return [
        name
        for name, (value, _) in values.items()
        if name in known and known[name]["scope"] == "user" and value not in known[name]["root_values"]
    ]


def table() -> list[tuple[str, str, str, str]]:
    """Return (name, environment variable, default, doc) of each setting.

    The docs and ``everos-engine settings`` show it.
    """
    return [
        (name, ENVIRONMENT_PREFIX + name.replace(".", "__").upper(), _show(fld.default), fld.metadata["doc"])
        for name, fld, _ in _fields(Settings, "")
    ]


def choices() -> dict[str, tuple[object, ...]]:
    """Return the values that each setting with choices may have."""
    return {name: get_args(hint) for name, _, hint in _fields(Settings, "") if get_origin(hint) is Literal}


def setters() -> dict[str, str]:
    """Return who may set each setting.

    It is "root" (any source), "user", or "user" and the values that a root's file may choose.
    """
    return {
        name: ", ".join([fld.metadata["scope"], *(f"root: `{value}`" for value in fld.metadata["root_values"])])
        for name, fld, _ in _fields(Settings, "")
    }


def describe(settings: Settings) -> dict[str, object]:
    """Return each setting's value by dotted name, secrets masked."""
    shown: dict[str, object] = {}
    for name, fld, _ in _fields(Settings, ""):
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        value = _masked(fld, value)
        shown[name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return shown


def _masked(fld: dataclasses.Field[Any], value: Any) -> Any:
    """Return a setting's value for people: a secret as ``MASK``, an address without its password and its query."""
    hidden = fld.metadata["hidden"]
    if hidden is None or value == "":
        return value
    return masked_url(value) if hidden == "url" and isinstance(value, str) else MASK


def masked_url(url: str) -> str:
    """Return an address of which only scheme, host, port and path can be read.

    It shows too little rather than too much.
    """
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        scheme, rest = "", url
    user, at, rest = rest.rpartition("@")  # a password that was not quoted may hold any character
    head, mark, _ = rest.partition("#")
    place, asks, _ = head.partition("?")
    mask_of = (f"{MASK}@" if user or at else "", f"?{MASK}" if asks else "", f"#{MASK}" if mark else "")
    return f"{scheme}{slashes}{mask_of[0]}{place}{mask_of[1]}{mask_of[2]}"


def secrets_of(settings: Settings | EmbedderSettings) -> list[str]:
    """Return every text that must not leave the process by a log, an error or a report, longest first."""
    found: set[str] = set()
    for name, fld, _ in _fields(type(settings), ""):
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        if fld.metadata["hidden"] == "whole":
            found |= {value, value.strip()}
        elif fld.metadata["hidden"] == "url":
            found |= _secrets_in(value)
    return sorted((one for one in found if one), key=len, reverse=True)


def parse_size(text: str) -> int:
    """Return the bytes in ``"16777216"``, ``"16MB"`` or ``"1.5 GiB"`` (binary units throughout).

    Raises ValueError otherwise.
    """
    match = _SIZE.fullmatch(text)
    unit = None if match is None else _UNITS.get((match[2] or "").upper())
    if match is None or unit is None:
        raise ValueError(f"{quoted(text)} is not a size: write bytes, or a number with KB, MB or GB")
    return int(float(match[1]) * unit)


def _secrets_in(url: str) -> set[str]:
    """Return the passwords and query values of an address, as they are written, decoded, and as HTTP sends them."""
    user, _, rest = url.partition("://")[2].rpartition("@")
    rest, _, fragment = rest.partition("#")
    query = rest.partition("?")[2]
    name, _, password = user.partition(":")
    plain = {password or name, query, fragment, *(part.partition("=")[2] for part in query.split("&"))}
    basic = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode("utf-8", "surrogatepass")).decode()
    found = plain | {unquote(one) for one in plain} | ({basic} if user else set())
    return {one for one in found if len(one) >= MIN_SECRET_CHARACTERS}


def _by_user(
    flags: Mapping[str, object] | None, env: Mapping[str, str], user_path: Path, refuse: Callable[[str], None]
) -> tuple[tuple[dict[str, tuple[object, str]], ...], Path]:
    """Return what the user's file, the environment and the flags say, weakest first, and the root they name."""
    from_file = _parse(user_path, _content(user_path, refuse), refuse)
    from_environment = _from_environment(env, refuse)
    from_flags = {name: (value, f"--{name}") for name, value in (flags or {}).items() if value is not None}
    values = {**from_file, **from_environment, **from_flags}
    try:
        root = _root_of(values)
    except SettingsError as error:
        refuse(str(error))
        root = Path(os.devnull)
    return (from_file, from_environment, from_flags), root


def _untrusted(root: Path, names: list[str], user_path: Path) -> str:
    command = shlex.join(["everos-engine", "--root", str(root), "trust"])
    return (
        f"{root / ROOT_SETTINGS_FILE}: a memory root's own file may set {', '.join(names)} only when you trust it, since that says "
        f"where text and keys go, or which file outside the root is written. `{command} --show` shows the values. Then run "
        f"`{command}`, or move the settings to {user_path}"
    )


def _check_credentials(
    settings: Settings,
    values: Mapping[str, tuple[object, str]],
    by_root: Mapping[str, tuple[object, str]],
    by_user: tuple[Mapping[str, tuple[object, str]], ...],
    refuse: Callable[[str], None],
) -> None:
    """Refuse to send what the user's own sources set to an address that only a root's file names."""
    if settings.embedder.kind != "http":
        return
    for name, fld, _ in _fields(Settings, ""):
        address = fld.metadata["sent_to"]
        if not address or name not in values or address not in by_root:
            continue
        by_users = [source[address][0] for source in by_user if address in source]
        if values[name] is by_root.get(name) or values[address][0] in by_users:
            continue
        refuse(
            f"{values[name][1]}: {name} is not sent to the address that {by_root[address][1]} sets: a key goes only where its own "
            f"source says. Set {address} in the same place as {name}"
        )


def _root_of(values: Mapping[str, tuple[object, str]]) -> Path:
    fld = next(fld for fld in dataclasses.fields(MemorySettings) if fld.name == "root")
    value, source = values.get("memory.root", (fld.default, "default"))
    return Path(os.path.expanduser(typing.cast("Path", _coerce("memory.root", value, Path, fld, source))))


def _fields(cls: type, prefix: str) -> list[tuple[str, dataclasses.Field[Any], Any]]:
    hints = get_type_hints(cls)
    found: list[tuple[str, dataclasses.Field[Any], Any]] = []
    for fld in dataclasses.fields(cls):
        hint = hints[fld.name]
        if dataclasses.is_dataclass(hint):
            found += _fields(typing.cast("type", hint), f"{prefix}{fld.name}.")
        else:
            found.append((prefix + fld.name, fld, hint))
    return found


def _build(cls: type, values: dict[str, tuple[object, str]], prefix: str, refuse: Callable[[str], None]) -> Any:
    """Take what belongs to ``cls`` out of ``values``. What is left over is unknown."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for fld in dataclasses.fields(cls):
        name, hint = prefix + fld.name, hints[fld.name]
        if dataclasses.is_dataclass(hint):
            arguments[fld.name] = _build(typing.cast("type", hint), values, f"{name}.", refuse)
        elif name in values:
            value, source = values.pop(name)
            try:
                arguments[fld.name] = _coerce(name, value, hint, fld, source)
            except SettingsError as error:
                refuse(str(error))
    return cls(**arguments)


def _coerce(name: str, value: object, hint: Any, fld: dataclasses.Field[Any], source: str) -> object:
    try:
        result = _convert(name, value, hint)
    except (ValueError, TypeError, OverflowError) as error:
        raise SettingsError(f"{source}: {name}={quoted(str(_masked(fld, value)))}: {clipped(str(error))}") from None
    min_, max_ = fld.metadata["min"], fld.metadata["max"]
    if isinstance(result, str):
        return result
    if min_ is not None and typing.cast("float", result) < min_:
        raise SettingsError(f"{source}: {name}={quoted(value)} is below its minimum {min_:g}")
    if max_ is not None and typing.cast("float", result) > max_:
        raise SettingsError(f"{source}: {name}={quoted(value)} is above its maximum {max_:g}")
    return result


def _convert(name: str, value: object, hint: Any) -> object:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    if get_origin(hint) in {typing.Union, types.UnionType}:  # a number, or a word that stands for one
        kind, words = get_args(hint)
        return value if value in get_args(words) else _convert(name, value, kind)
    if get_origin(hint) is tuple:
        parts = value.split(os.pathsep) if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
            raise ValueError("must be a list of strings")
        return tuple(part for part in parts if part)
    if hint is bool:
        return _as_bool(value)
    if hint is int:
        if isinstance(value, str):
            return parse_size(value) if name.endswith("_bytes") else _number(value, int, "a whole number")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("must be a whole number")
        return value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError("must be a number")
        number = _number(value, float, "a number")
        if number != number or number in {float("inf"), float("-inf")}:  # noqa: PLR0124 - NaN is the one unequal to itself
            raise ValueError("must be a finite number")
        return number
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("must be a string")
    if "\0" in os.fspath(value):
        raise ValueError("must not hold a NUL")
    return _path(os.fspath(value)) if hint is Path else os.fspath(value)


def _path(text: str) -> Path:
    if not text:
        raise ValueError("must not be empty")
    if os.path.expanduser(text).startswith("~"):
        raise ValueError("there is no home directory of that name: set HOME, or write the whole path")
    return Path(text)


def _number(value: object, kind: Callable[[Any], N], wanted: str) -> N:
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"must be {wanted}") from None


def _as_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise ValueError("must be true or false")


def _check_together(settings: Settings, refuse: Callable[[str], None]) -> None:
    if settings.worker_batch_max < settings.worker_batch_size:
        refuse(
            f"worker_batch_max={settings.worker_batch_max} is below worker_batch_size={settings.worker_batch_size}: "
            "raise the first or lower the second"
        )
    budgets = settings.lancedb
    if budgets.hard_budget_share < budgets.soft_budget_share:
        refuse(
            f"lancedb.hard_budget_share={budgets.hard_budget_share:g} is below "
            f"lancedb.soft_budget_share={budgets.soft_budget_share:g}: raise the first or lower the second"
        )
    embedder = settings.embedder
    if embedder.kind == "http" and not (embedder.url and embedder.model):
        refuse("embedder.kind=http needs embedder.url and embedder.model: set both, or choose kind local or none")


def _user_file(env: Mapping[str, str]) -> Path:
    home = env.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    if home.startswith("~"):
        return Path(os.devnull)  # this user has no home directory, and so no settings there
    return Path(home) / "everos-engine" / "settings.toml"


def _content(path: Path, refuse: Callable[[str], None]) -> bytes:
    """Return the bytes of a settings file, or none if there is no such file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        message = f"{path}: cannot be read as settings: {error.strerror or error}: give this user permission to read it, or move it away"
        if isinstance(error, PermissionError) and not os.access(path.parent, os.X_OK):
            give = shlex.join(["chmod", "u+rwX", str(path.parent)])
            message = f"{path.parent} may not be entered by uid {os.geteuid()}: as its owner, `{give}`"
        refuse(message)
        return b""


def _parse(path: Path, content: bytes, refuse: Callable[[str], None]) -> dict[str, tuple[object, str]]:
    try:
        data = tomllib.loads(content.decode("utf-8-sig"))  # an editor may begin the file with a BOM
    except (ValueError, RecursionError) as error:
        refuse(f"{path}: cannot be read as settings: {_reason(error)}")
        return {}
    return {name: (value, str(path)) for name, value in _flatten(data, "")}


def _reason(error: Exception) -> str:
    """Return why a file is not settings, in our words if the parser's are not clear."""
    if isinstance(error, RecursionError):
        return "its tables are nested too deeply: write section and name only"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8: save it as UTF-8"
    return f"{error}: write it as TOML"


def _flatten(data: Mapping[str, object], prefix: str) -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, value))
    return flat


def _from_environment(env: Mapping[str, str], refuse: Callable[[str], None]) -> dict[str, tuple[object, str]]:
    """Return what our variables say.

    A name that is nearly one of ours is refused. Others are not, because other programs use the prefix too.
    """
    found: dict[str, tuple[object, str]] = {}
    known = {variable: name for name, variable, _, _ in table()}
    known.update({ENVIRONMENT_PREFIX + name.replace(".", "__").upper(): name for name in REFUSED})
    for variable, name in known.items():
        if env.get(variable):
            found[name] = (env[variable], variable)
    if env.get("EVEROS_ROOT"):
        found["memory.root"] = (env["EVEROS_ROOT"], "EVEROS_ROOT")
    for variable in sorted(env):
        if variable.startswith(ENVIRONMENT_PREFIX) and env[variable] and variable not in {*known, "EVEROS_ROOT"}:
            _refuse_slip(variable, [*known, "EVEROS_ROOT"], refuse)
    return found


def _refuse_slip(variable: str, known: list[str], refuse: Callable[[str], None]) -> None:
    """Refuse a variable that is a mistyped one of ``known``, or that names a section of ours and nothing in it."""
    bare = {name.removeprefix(ENVIRONMENT_PREFIX): name for name in known}
    asked = variable.removeprefix(ENVIRONMENT_PREFIX)
    meant = nearest(asked, bare)
    if meant is not None:
        refuse(f"{variable}: there is no such variable: did you mean {bare[meant]}? Rename it, or unset it")
    elif (
        "__" in asked
        and asked.partition("__")[0] in {name.partition("__")[0] for name in bare if "__" in name} - SHARED
    ):
        refuse(f"{variable}: there is no such setting: `everos-engine settings` lists them all. Rename it, or unset it")


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[]" if not value else ", ".join(map(str, value))
    return str(value) if value != "" else '""'
