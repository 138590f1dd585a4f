"""Facts remembered next to the queue: times of full scans, the positions of walks, an outage that lasts."""

from __future__ import annotations

import json
from typing import cast

from everos_engine.stores.database import Transaction, drain

SLOPE = "descriptor_slope"
"""The name of the slope that the descriptor guard learned."""


def get(tx: Transaction, name: str) -> str | None:
    """Return a remembered fact, or None."""
    for (value,) in tx.execute("SELECT value FROM meta WHERE name = ?", (name,)):
        return cast("str | None", value)
    return None


def put(tx: Transaction, name: str, value: str) -> None:
    """Remember a fact."""
    drain(
        tx.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
        )
    )


def note_outage(tx: Transaction, reason: str | None, *, now_milliseconds: int) -> None:
    """Record since when and why the embedding service is down, for every process that asks.

    None records that it answers.
    """
    known = outage(tx)
    since = known[0] if known else now_milliseconds
    put(tx, "embedder_down", "" if reason is None else json.dumps([since, reason]))


def outage(tx: Transaction) -> tuple[int, str] | None:
    """Return (milliseconds since the epoch, reason) of the embedding service's outage, or None while it answers."""
    known = get(tx, "embedder_down")
    return cast("tuple[int, str]", tuple(json.loads(known))) if known else None
