"""Put a function before the system's calls about a tree of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def calls_about(root: Path, names: Sequence[str], first: Callable[[str], None]) -> Iterator[None]:
    """Run ``first(path)`` before these functions of ``os``, for paths below the root that are not below its .index.

    What it raises is what the function raises.
    """
    kept = {name: getattr(os, name) for name in names}

    def trapped(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(path: object = ".", *args: object, **options: object) -> object:
            if isinstance(path, str) and path.startswith(f"{root}/") and "/.index" not in path:
                first(path)
            return call(path, *args, **options)

        return wrapper

    for name, call in kept.items():
        setattr(os, name, trapped(call))
    try:
        yield
    finally:
        for name, call in kept.items():
            setattr(os, name, call)
