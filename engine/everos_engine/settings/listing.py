"""The settings as tables, for the documentation and the command `settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from everos_engine.settings.masking import masked
from everos_engine.settings.model import Settings, fields_of

ENVIRONMENT_PREFIX = "EVEROS_"


def table() -> list[tuple[str, str, str, str]]:
    """Return (name, environment variable, default, doc) of each setting.

    The docs and ``everos-engine settings`` show it.
    """
    return [
        (name, ENVIRONMENT_PREFIX + name.replace(".", "__").upper(), _show(fld.default), fld.metadata["doc"])
        for name, fld, _ in fields_of(Settings, "")
    ]


def choices() -> dict[str, tuple[object, ...]]:
    """Return the values that each setting with choices may have."""
    return {name: get_args(hint) for name, _, hint in fields_of(Settings, "") if get_origin(hint) is Literal}


def setters() -> dict[str, str]:
    """Return who may set each setting.

    It is "root" (any source), "user", or "user" and the values that a root's file may choose.
    """
    return {
        name: ", ".join([fld.metadata["scope"], *(f"root: `{value}`" for value in fld.metadata["root_values"])])
        for name, fld, _ in fields_of(Settings, "")
    }


def describe(settings: Settings) -> dict[str, object]:
    """Return each setting's value by dotted name, secrets masked."""
    shown: dict[str, object] = {}
    for name, fld, _ in fields_of(Settings, ""):
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        value = masked(fld, value)
        shown[name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return shown


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[]" if not value else ", ".join(map(str, value))
    return str(value) if value != "" else '""'
