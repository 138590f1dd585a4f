"""Apply held deletions: `release`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everos_engine.cli.delegation import (
    run_or_delegate,
    wait_until_applied,
)
from everos_engine.cli.outcomes import OK, TROUBLE, show_outcome
from everos_engine.engine import Engine
from everos_engine.loops.context import now_milliseconds
from everos_engine.loops.deletion_guard import write_marker
from everos_engine.settings import Settings
from everos_engine.stores import held, queue, reports
from everos_engine.stores.database import Database
from everos_engine.stores.reports import Outcome

if TYPE_CHECKING:
    import argparse


def command(settings: Settings, _arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    outcomes = release(settings)
    for outcome in outcomes:
        show_outcome(outcome)
    print(f"{len(outcomes)} released")
    return TROUBLE if any(outcome.status == "failed" for outcome in outcomes) else OK


def release(settings: Settings) -> list[Outcome]:
    """Apply every held deletion. Returns what became of each."""

    async def own(engine: Engine) -> list[Outcome]:
        return await engine.release()

    async def hand_over(database: Database) -> list[Outcome]:
        write_marker(settings)
        paths = database.write(lambda tx: held.release(tx, now_milliseconds=now_milliseconds()))
        await wait_until_applied(settings, database, database.read(queue.newest))
        return database.read(lambda tx: reports.outcomes(tx, paths))

    return run_or_delegate(settings, own, hand_over)
