"""List failures, or try them again: `fix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everos_engine.cli.outcomes import OK, TROUBLE, program, show_outcome
from everos_engine.settings import Settings

if TYPE_CHECKING:
    import argparse

    from everos_engine.engine import Engine
    from everos_engine.stores.database import Database
    from everos_engine.stores.reports import Outcome


def command(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    from everos_engine.diagnose import status

    if arguments.apply:
        tried = retry(settings)
        return _report_tried(tried, status.failed(settings), f"{program(settings, arguments)} fix")
    failed = status.failed(settings)
    for outcome in failed:
        show_outcome(outcome)
    print(f"{len(failed)} failed")
    return TROUBLE if failed else OK


def _report_tried(tried: list[Outcome], failed: list[Outcome], listing: str) -> int:
    """Say what became of what was tried again, and what no attempt can help."""
    for outcome in tried:
        show_outcome(outcome)
    again = sum(outcome.status == "failed" for outcome in tried)
    left = len({outcome.md_path for outcome in failed} - {outcome.md_path for outcome in tried})
    first = f"{len(tried)} tried again, {again} failed again" if tried else "nothing to try again"
    print(first + (f"; {left} more failed and are listed with what to edit by `{listing}`" if left else ""))
    return TROUBLE if failed else OK


def retry(settings: Settings) -> list[Outcome]:
    """Try every retryable failure again. Returns what became of each."""
    from everos_engine.cli.delegation import run_or_delegate, wait_until_applied  # loads LanceDB
    from everos_engine.loops.context import now_milliseconds
    from everos_engine.stores import queue, reports

    async def own(engine: Engine) -> list[Outcome]:
        return await engine.fix()

    async def hand_over(database: Database) -> list[Outcome]:
        paths = database.write(lambda tx: queue.requeue_failed(tx, now_milliseconds=now_milliseconds()))
        await wait_until_applied(settings, database, database.read(queue.newest))
        return database.read(lambda tx: reports.outcomes(tx, paths))

    return run_or_delegate(settings, own, hand_over)
