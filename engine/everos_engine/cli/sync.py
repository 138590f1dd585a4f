"""Bring the index in step with the files: `sync` and `sync --audit`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from everos_engine.cli import terminal
from everos_engine.cli.delegation import (
    LOOK_SECONDS,
    run_or_delegate,
    wait_until_applied,
)
from everos_engine.cli.outcomes import OK, TROUBLE, program, show_outcome
from everos_engine.diagnose.wording import plural, shown
from everos_engine.engine import Engine
from everos_engine.loops.deletion_guard import DeletionGuard
from everos_engine.loops.reconcile import audit as audit_next
from everos_engine.loops.reconcile import reconcile_tree
from everos_engine.loops.requests import enqueue
from everos_engine.loops.scanner import AUDIT_FILES
from everos_engine.settings import Settings
from everos_engine.stores import ledger, queue, reports, versions
from everos_engine.stores.database import Database
from everos_engine.stores.reports import Outcome
from everos_engine.system import files
from everos_engine.system.control import ask
from everos_engine.system.file_threads import call_within, open_threads

if TYPE_CHECKING:
    import argparse

MAX_LOOK_SECONDS = 60.0
"""How long the running engine may take to see that a table is gone."""


def command(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    from everos_engine.diagnose import status

    if arguments.audit:
        found = read_again(settings)
        for path in found:
            print(f"{shown(path)}: its content had changed unseen, now in step")
        print(f"audit done: {len(found)} differed")
        return OK
    unknown = status.unknown(settings, arguments.paths)
    outcomes = bring_in_step(settings, arguments.paths)
    if not arguments.paths:
        return _report_all(outcomes, settings, arguments)
    for outcome in outcomes:
        show_outcome(outcome)
        if outcome.status is None and outcome.md_path in unknown:
            terminal.say(
                f"{shown(outcome.md_path)}: nothing was indexed of it: check the name, unless it was just deleted"
            )
    bad = [
        one for one in outcomes if one.status in {"failed", "pending"} or one.held is not None or one.md_path in unknown
    ]
    return TROUBLE if bad else OK


def _report_all(troubled: list[Outcome], settings: Settings, arguments: argparse.Namespace) -> int:
    """Say how much is in step, what is failed, and which files do not answer."""
    from everos_engine.diagnose import status

    for outcome in troubled:
        show_outcome(outcome)
    failed = sum(outcome.status == "failed" for outcome in troubled)
    found = status.snapshot(settings)
    held = sum(one.count for one in found.moment.held) if found.moment else 0
    waits = f", {plural(held, 'deletion')} held: `{program(settings, arguments)} status` says why" if held else ""
    print(
        f"in step: {found.counts.done if found.counts else 0} files, {sum(found.rows.values())} rows, {failed} failed{waits}"
    )
    return TROUBLE if troubled else OK


def bring_in_step(settings: Settings, paths: Sequence[str]) -> list[Outcome]:
    """Bring everything, or only ``paths``, in step. Returns what became of each path, or everything that is failed.

    A path is looked up from the root, or from the working directory if only that has such a file.
    """
    paths = [_locate(settings, path) for path in paths]

    async def own(engine: Engine) -> list[Outcome]:
        return await engine.sync(paths)

    async def hand_over(database: Database) -> list[Outcome]:
        if paths:
            keys, lsn = await enqueue(settings, database, paths)
            await wait_until_applied(settings, database, lsn)
            return database.read(lambda tx: reports.standing(tx, keys))
        deletion_guard = DeletionGuard(settings)
        deletion_guard.capture_root()
        found = await reconcile_tree(settings, database, source="sync", deletion_guard=deletion_guard)
        newest = await look_at_tables(settings, database)
        await wait_until_applied(settings, database, max(found.lsn, newest))
        return database.read(reports.troubled)

    return run_or_delegate(settings, own, hand_over)


def _locate(settings: Settings, path: str) -> str:
    """Return the path that is meant. Raises NoAnswer if its directory hangs."""
    deadline = settings.file_deadline_seconds
    return call_within(lambda: files.locate(settings.root, path), name=path, seconds=deadline)


def read_again(settings: Settings) -> list[str]:
    """Read every file again. Returns the paths whose content was not what was indexed, which are in step now."""
    found: list[str] = []

    async def own(engine: Engine) -> list[Outcome]:
        await engine.settle()
        found.extend(await engine.audit())
        return []

    async def hand_over(database: Database) -> list[Outcome]:
        end: str | None = ""
        threads = open_threads(deadline_seconds=settings.file_deadline_seconds)
        while end is not None:
            _, queued, end = await audit_next(settings, database, threads, after=end, limit=AUDIT_FILES)
            found.extend(queued)
        await wait_until_applied(settings, database, database.read(queue.newest))
        return []

    run_or_delegate(settings, own, hand_over)
    return found


async def look_at_tables(settings: Settings, database: Database) -> int:
    """Have the running engine look at tables that changed or are gone. Returns the newest lsn once it has."""

    def differing() -> set[tuple[str, str]]:
        known = database.read(ledger.incarnations)
        return {
            (kind, table.incarnation)
            for kind, table in known.items()
            if table.number and versions.follow(settings.lancedb_directory / f"{kind}.lance", table.version) is None
        }

    before = differing()
    if before:
        with suppress(TimeoutError), trio.move_on_after(MAX_LOOK_SECONDS):
            ask(settings.control_socket, "look")
            while before & differing():  # noqa: ASYNC110 - what another process does has no event here
                await trio.sleep(LOOK_SECONDS)
    return database.read(queue.newest)
