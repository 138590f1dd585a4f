"""Load settings. Defaults < user's TOML < the root's TOML < ``EVEROS_*`` environment < command line flags."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from everos_engine import trust
from everos_engine.errors import SettingsError, clipped, quoted
from everos_engine.settings.listing import ENVIRONMENT_PREFIX, table
from everos_engine.settings.masking import masked
from everos_engine.settings.model import MemorySettings, Settings, fields_of
from everos_engine.settings.paths import ROOT_SETTINGS_FILE
from everos_engine.spelling import nearest

N = TypeVar("N", int, float)
SHARED = {"MEMORY"}
"""Sections in which other programs have settings too."""
_UNITS = {"": 1, "B": 1, "KB": 1 << 10, "KIB": 1 << 10, "MB": 1 << 20, "MIB": 1 << 20, "GB": 1 << 30, "GIB": 1 << 30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)(?:\s*([A-Za-z]+))?\s*")
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
REFUSED = {
    "lancedb.metadata_cache_size_bytes": (
        "must not be set: the metadata cache holds parsed manifests and fragment statistics and has no effect on the "
        "number of file descriptors; capping it only repeats parsing. Remove it, and set lancedb.index_cache_size_bytes"
    ),
}


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
    known = [known for known, _, _ in fields_of(Settings, "")]
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
    known = {name: fld for name, fld, _ in fields_of(Settings, "")}
    return root, content, {name: masked(known[name], by_root[name][0]) for name in restricted(by_root)}


def restricted(values: Mapping[str, tuple[object, str]]) -> list[str]:
    """Return which of a root's own settings it may set only when the user trusts its file."""
    known = {name: fld.metadata for name, fld, _ in fields_of(Settings, "")}
    return [
        name
        for name, (value, _) in values.items()
        if name in known and known[name]["scope"] == "user" and value not in known[name]["root_values"]
    ]


def parse_size(text: str) -> int:
    """Return the bytes in ``"16777216"``, ``"16MB"`` or ``"1.5 GiB"`` (binary units throughout).

    Raises ValueError otherwise.
    """
    match = _SIZE.fullmatch(text)
    unit = None if match is None else _UNITS.get((match[2] or "").upper())
    if match is None or unit is None:
        raise ValueError(f"{quoted(text)} is not a size: write bytes, or a number with KB, MB or GB")
    return int(float(match[1]) * unit)


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
    for name, fld, _ in fields_of(Settings, ""):
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
        raise SettingsError(f"{source}: {name}={quoted(str(masked(fld, value)))}: {clipped(str(error))}") from None
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
