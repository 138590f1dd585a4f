"""The models that made the tables' vectors. They are in engine.db, so that a lost cache does not void the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from everos_engine.stores.database import Transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS embedding_model (number INTEGER PRIMARY KEY, name TEXT NOT NULL, probe BLOB NOT NULL) STRICT;
"""
UPGRADE_TO_3 = ""
"""What version 3 changes in the tables of version 2. New tables and indexes come with SCHEMA."""


def known(tx: Transaction) -> dict[int, tuple[str, NDArray[np.float32]]]:
    """Return number -> (name, probe vector) of each model that made vectors of the tables."""
    return {
        cast("int", number): (cast("str", name), np.frombuffer(cast("bytes", probe), dtype="<f4"))
        for number, name, probe in tx.execute("SELECT number, name, probe FROM embedding_model")
    }


def add(tx: Transaction, number: int, name: str, probe: NDArray[np.float32]) -> None:
    """Remember a model by the vector it gives the probe sentence."""
    row = (number, name, np.asarray(probe, dtype="<f4").tobytes())
    for _ in tx.execute("INSERT OR REPLACE INTO embedding_model VALUES (?, ?, ?)", row):
        pass
