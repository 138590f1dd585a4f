"""A search by a running engine: no import of LanceDB, no model to load, an answer in a blink."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everos_engine.settings import Settings
from everos_engine.system.control import ask

if TYPE_CHECKING:
    import argparse

LOOK_SECONDS = 1.0
DEADLINE_SECONDS = 30.0
FIELDS = ("mode", "kind", "owner", "app", "project", "limit")


def search(settings: Settings, arguments: argparse.Namespace) -> list[dict[str, object]] | None:
    """Return results as plain data. None if no engine answers, or if it cannot say. Then the command searches."""
    details = {"query": " ".join(arguments.query)} | {name: getattr(arguments, name) for name in FIELDS}
    try:
        if ask(settings.control_socket, "pulse", deadline_seconds=LOOK_SECONDS) is None:
            return None
        answer = ask(settings.control_socket, "search", details, deadline_seconds=DEADLINE_SECONDS)
    except TimeoutError:
        return None
    results = None if answer is None else answer.get("results")
    return results if isinstance(results, list) else None
