"""The soak's child with one of the planted leaks: ``python -m fuzz.soak.planted_engine LEAK FLAGS``."""

from __future__ import annotations

import sys

from everos_engine import engine
from everos_engine.stores.index import Index, open_index
from fuzz.descriptors.planted import LEAKS
from fuzz.soak import engine as child


def main(arguments: list[str]) -> None:
    leak = LEAKS[arguments[0]]

    def opened(*given: object, **named: object) -> Index:
        whole = open_index(*given, **named)  # type: ignore[arg-type]
        return leak(whole.bridge, whole.settings, whole.kinds, whole.directory, whole.cap_bytes)

    engine.open_index = opened  # type: ignore[assignment]
    child.SETTLE_SECONDS = 20.0  # it will not, for want of descriptors
    child.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
