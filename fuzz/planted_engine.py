"""The soak's child with one of the planted leaks: ``planted_engine.py LEAK FLAGS``."""

from __future__ import annotations

import sys

import soak_engine
from planted import LEAKS

from everos_engine import engine
from everos_engine.stores.index import Index, open_index


def main(arguments: list[str]) -> None:
    leak = LEAKS[arguments[0]]

    def opened(*given: object, **named: object) -> Index:
        whole = open_index(*given, **named)  # type: ignore[arg-type]
        return leak(whole.bridge, whole.settings, whole.kinds, whole.directory, whole.cap_bytes)

    engine.open_index = opened  # type: ignore[assignment]
    soak_engine.SETTLE_SECONDS = 20.0  # it will not, for want of descriptors
    soak_engine.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
