"""Keep a LanceDB index in step with a tree of markdown, the memory of people and agents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everos_engine.settings import Settings, load

if TYPE_CHECKING:
    from everos_engine.cli.run import run
    from everos_engine.engine import Engine, open_engine

__all__ = ["Engine", "Settings", "load", "open_engine", "run"]
_LAZY = {"Engine": "everos_engine.engine", "open_engine": "everos_engine.engine", "run": "everos_engine.cli.run"}


def __getattr__(name: str) -> object:
    """Import LanceDB late. It takes a second, and only programs that open an engine need it."""
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
