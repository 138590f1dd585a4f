"""Passwords and tokens in settings are masked before anything shows them."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any
from urllib.parse import unquote

from everos_engine.settings.model import EmbedderSettings, Settings, fields_of

MASK = "********"
MIN_SECRET_CHARACTERS = 4
"""A shorter part of an address is not masked in a text, because it is part of too many words."""


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
    for name, fld, _ in fields_of(type(settings), ""):
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        if fld.metadata["hidden"] == "whole":
            found |= {value, value.strip()}
        elif fld.metadata["hidden"] == "url":
            found |= _secrets_in(value)
    return sorted((one for one in found if one), key=len, reverse=True)


def masked(fld: dataclasses.Field[Any], value: Any) -> Any:
    """Return a setting's value for people: a secret as ``MASK``, an address without its password and its query."""
    hidden = fld.metadata["hidden"]
    if hidden is None or value == "":
        return value
    return masked_url(value) if hidden == "url" and isinstance(value, str) else MASK


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
