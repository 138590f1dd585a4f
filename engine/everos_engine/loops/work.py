"""The worker: claims changes, reads, diffs, embeds what is new, commits once per kind, and marks.

Stages overlap: while one batch waits for its vectors the next is read, and a job whose vectors are there is committed
with whatever else is ready, so that one slow text or bad file never holds up its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING

import trio
from loguru import logger
from trio_util import AsyncValue

from everos_engine.errors import BadFile, BadText, EngineError, Exhausted, RootAway, Transient, Unavailable, exhausted
from everos_engine.loops.agree import expect_root, heal
from everos_engine.loops.brake import REMEDY, WHY
from everos_engine.loops.desk import Desk, now_milliseconds, wait_moved
from everos_engine.loops.job import Job, looks_torn, put_off, refuse, unsettled
from everos_engine.loops.marks import Written, mark
from everos_engine.loops.vectors import MODEL_CHANGED
from everos_engine.stores import ledger, meta, queue
from everos_engine.stores.lance import Model, Row
from everos_engine.system import files, locks
from everos_engine.text import diff, kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from everos_engine.stores.database import Transaction

COMMIT_ENTRIES = 8192
REAP_SECONDS = 30.0
HELD_FACTOR = 4
HELD_BYTES = 32 << 20
"""Markdown in work before no more is read; what is made of it takes several times as much memory."""
READ_BYTES = 8 << 20
IDLE_SECONDS = 60.0


async def work(desk: Desk) -> None:
    """Serve the queue until cancelled; whatever is held then is handed back."""
    worker = _Worker(desk)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.commit_loop)
            nursery.start_soon(_poll, desk)
            nursery.start_soon(_reap, desk)
            nursery.start_soon(worker.attend)
            await worker.claim_loop()
    finally:
        with trio.CancelScope(shield=True):
            await desk.database.awrite(lambda tx: queue.recover(tx, [desk.owner]))


class _Worker:
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.held = AsyncValue(0)
        self.held_bytes = AsyncValue(0)
        self.life = 0
        self.ready, self.ready_jobs = trio.open_memory_channel["Job | None"](4 * desk.settings.worker_batch_max)

    async def claim_loop(self) -> None:
        settings, desk = self.desk.settings, self.desk
        async with trio.open_nursery() as nursery:
            while True:
                seen = desk.wake.value
                self._beat()
                await self._breathe()
                while claims := await self._claim():
                    self._beat()
                    self.held.value += len(claims)
                    nursery.start_soon(self._prepare, claims)
                    most = max(1.0, HELD_FACTOR * settings.worker_batch_size * desk.pressure.value)
                    await self.held.wait_value(lambda held, most=most: held < most)
                    await self._breathe()
                due = await desk.database.aread(partial(queue.next_due, now_milliseconds=now_milliseconds()))
                pause = IDLE_SECONDS if due is None else min(IDLE_SECONDS, max(0.0, (due - now_milliseconds()) / 1000))
                await wait_moved(desk.wake, seen, at_most_seconds=pause)

    async def _breathe(self) -> None:
        """New claims wait while the guard lets none through."""
        while self.desk.pressure.value <= 0:
            self._beat()
            with trio.move_on_after(IDLE_SECONDS):
                await self.desk.pressure.wait_value(lambda share: share > 0)

    def _beat(self) -> None:
        """While changes are held the next sign is a commit, which one embedding call and one write may hold up."""
        settings = self.desk.settings
        slowest = settings.embedder.deadline_seconds + settings.lancedb.write_deadline_seconds
        self.desk.beat("work", within_seconds=IDLE_SECONDS + slowest)

    async def _claim(self) -> list[queue.Claim]:
        settings = self.desk.settings

        share = self.desk.pressure.value

        def take(tx: Transaction) -> list[queue.Claim]:
            limit = min(settings.worker_batch_max, max(settings.worker_batch_size, queue.ready(tx)))
            limit = max(1, int(limit * share))
            return queue.claim(tx, self.desk.owner, limit=limit, now_milliseconds=now_milliseconds())

        due = await self.desk.database.aread(_has_ready)
        return await self.desk.database.awrite(take) if due else []

    async def _prepare(self, claims: list[queue.Claim]) -> None:
        """Read and diff off the loop, as much as memory should hold; send each job on as soon as it needs nothing more."""
        known = await self.desk.database.aread(lambda tx: ledger.known(tx, [claim.md_path for claim in claims]))
        async with trio.open_nursery() as nursery:
            while claims:
                await self.held_bytes.wait_value(lambda held: held < HELD_BYTES)
                jobs = await trio.to_thread.run_sync(self._read_some, claims, known)
                claims = claims[len(jobs) :]
                self.held_bytes.value += sum(job.size_bytes for job in jobs)
                await self._look_up(jobs)
                for job in jobs:
                    if job.error is None and job.missing and self.desk.vectors.gate is not None:
                        nursery.start_soon(self._embed, job)
                    else:
                        await self.ready.send(job)

    def _read_some(self, claims: list[queue.Claim], known: Mapping[str, Mapping[str, bytes]]) -> list[Job]:
        """Read, parse and diff the first of ``claims``, as many as fit into READ_BYTES."""
        jobs, read_bytes = [], 0
        for claim in claims:
            job = self._read(claim)
            before = known[claim.md_path]
            if job.error is None:
                job.plan = diff.plan(job.document, before)
            if looks_torn(job, before):
                job.error = unsettled(job, self.desk.settings.settle_milliseconds) or job.error
            jobs.append(job)
            read_bytes += job.size_bytes
            if read_bytes >= READ_BYTES:
                break
        return jobs

    def _read(self, claim: queue.Claim) -> Job:
        settings, job = self.desk.settings, Job(claim)
        place = kinds.recognise(claim.md_path, note_globs=settings.note.globs)
        if place is None:
            return job  # of no kind any more: its rows go
        try:
            reading = files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
            job.fingerprint, job.racy, job.digest = reading.fingerprint, reading.racy, reading.digest
            job.size_bytes = sum(map(len, reading.sources.values()))
            job.hollow = not all(reading.sources.values())
            job.document = kinds.parse(place, reading.sources)
            job.problems = list(job.document.problems)
        except files.Vanished:
            job.error = self._deletable()
        except BadFile as error:
            job.error = error
            if job.fingerprint is None:
                try:
                    job.fingerprint = files.fingerprint(settings.root, place)
                except Transient as unseen:
                    job.error = unseen
        except (Transient, OSError) as error:
            job.error = error if isinstance(error, Transient) else Transient(f"reading failed: {error}")
            if claim.source == "release" and files.is_out_of_reach(job.error):
                job.error = self._deletable()  # somebody decided that what cannot be looked at is gone
        except Exception as error:  # noqa: BLE001 - a bug one file reveals must not stop the memory of everyone else
            if exhausted(error):
                job.error = Exhausted(f"reading failed: {error}")
                return job
            logger.opt(exception=error).error("parser_bug path={}", claim.md_path)
            job.error = BadFile(
                f"internal error: {error!r}", remedy="please report this file's shape; an edit tries again"
            )
        return job

    def _deletable(self) -> Transient | None:
        """Why the rows of a file that is not there may not be deleted now; None where they may."""
        try:
            trouble = self.desk.brake.trouble()
        except Exhausted as error:
            return error
        if trouble in {None, "root_empty"}:
            return None
        return RootAway(f"not deleted: {WHY[trouble]}; {REMEDY[trouble]}")

    async def _look_up(self, jobs: list[Job]) -> None:
        texts = list(dict.fromkeys(text for job in jobs if job.error is None for text in job.missing))
        try:
            known = await self.desk.vectors.cached(texts)
        except Transient as error:
            for job in jobs:
                if job.error is None and job.missing:
                    put_off(job, dict.fromkeys(job.missing, error))
            return
        for job in jobs:
            job.vectors = {text: known[text] for text in job.missing if text in known}
            job.life = self.desk.vectors.life

    async def _embed(self, job: Job) -> None:
        missing = job.missing
        refused: dict[str, EngineError] = {}
        later: dict[str, Transient] = {}
        for text, outcome in zip(missing, await self.desk.vectors.embed(missing), strict=True):
            if isinstance(outcome, BadText):
                refused[text] = outcome
            elif isinstance(outcome, Transient):
                later[text] = outcome
            else:
                job.vectors[text] = outcome
        if refused:
            refuse(job, refused)
        if later:
            put_off(job, later)
        await self.ready.send(job)

    async def attend(self) -> None:
        """Tell of the embedding service's outages, and have what waited for it done as soon as it answers."""
        desk, gate = self.desk, self.desk.vectors.gate
        if gate is None:
            return
        async with aclosing(gate.down.eventual_values()) as reasons:
            async for reason in reasons:
                await desk.database.awrite(partial(_note_outage, reason=reason, now_milliseconds=now_milliseconds()))
                if reason is None:
                    with suppress(Unavailable):
                        if desk.index.open_kinds():
                            await desk.vectors.model()
                        await self.ready.send(None)
                    desk.wake_up()

    async def _renew(self) -> None:
        """Begin every kind again whose vectors are of a model that answers no more: two models never share a table."""
        vectors = self.desk.vectors
        if vectors.life in {0, self.life}:
            return
        model = await vectors.model()
        for kind in self.desk.index.open_kinds():
            if self.desk.index.model_of(kind) != model.name:
                await self._new_life(kind, model)
        self.life = vectors.life

    async def commit_loop(self) -> None:
        while True:
            first = await self.ready_jobs.receive()
            for _ in range(3):  # let the tasks that were woken together arrive together
                await trio.lowlevel.checkpoint()
            jobs = [first] if first else []
            entries = 0
            while entries < COMMIT_ENTRIES:
                try:
                    job = self.ready_jobs.receive_nowait()
                except trio.WouldBlock:
                    break
                if job is not None:
                    entries += len(job.plan.upserts)
                    jobs.append(job)
            with trio.CancelScope(shield=True):
                await self._renew()
                await self._commit(jobs)
            self.held.value -= len(jobs)
            self.held_bytes.value -= sum(job.size_bytes for job in jobs)
            self._beat()
            self.desk.applied.value += 1

    async def _commit(self, jobs: list[Job]) -> None:
        """Commit each kind once; a kind in trouble postpones its own jobs only."""
        by_kind: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_kind[job.claim.kind].append(job)
        for kind, of_kind in by_kind.items():
            writing = [job for job in of_kind if job.error is None and (job.plan.upserts or job.plan.deletes)]
            written = None
            if writing:
                try:
                    await expect_root(self.desk)
                    written = await self._write(kind, writing)
                except Transient as failure:
                    error = failure
                    try:
                        await heal(self.desk, kind)
                    except Transient as lost:
                        error = lost
                    for job in writing:
                        job.error = error
            for job in of_kind:
                if isinstance(job.error, Transient) and self.desk.starved(job.error):
                    job.error = Exhausted(str(job.error))
                if job.put_off is not None and self.desk.starved(job.put_off):
                    job.put_off = Exhausted(str(job.put_off))
            await self.desk.database.awrite(partial(mark, desk=self.desk, kind=kind, jobs=of_kind, written=written))
            self.desk.wake_up()  # one edited meanwhile is ready again, one postponed has a time it is due
            self.desk.progress.applied += len(of_kind)
            if written is not None:
                self.desk.progress.commits[kind] = self.desk.progress.commits.get(kind, 0) + 1

    async def _write(self, kind: str, jobs: list[Job]) -> Written | None:
        """One commit to the kind's table, or None where only unknown keys of no table were deleted."""
        index, database = self.desk.index, self.desk.database
        rows = [
            Row(job.claim.md_path, entry.entry_id, entry.content_hash, entry.values, job.vectors.get(entry.embed_text))
            for job in jobs
            for entry in job.plan.upserts
        ]
        deletes = [(job.claim.md_path, entry_id) for job in jobs for entry_id in job.plan.deletes]
        if index.model_of(kind) is None and not rows:
            return None
        if rows:
            model = await self.desk.vectors.model()
            if any(job.vectors and job.life != self.desk.vectors.life for job in jobs):
                raise Unavailable(MODEL_CHANGED)
            if index.model_of(kind) != model.name:
                await self._new_life(kind, model)

        def intend(tx: Transaction) -> None:
            for job in jobs:
                touched = [entry.entry_id for entry in job.plan.upserts] + list(job.plan.deletes)
                ledger.intend(tx, job.claim.md_path, kind, touched)

        await database.awrite(intend)
        incarnation = index.incarnation_of(kind)
        return Written(incarnation, await index.commit(kind, rows, deletes))

    async def _new_life(self, kind: str, model: Model) -> None:
        """A table for ``model``; whatever the kind had goes, and its files come again with their cached vectors."""
        had = self.desk.index.model_of(kind)
        incarnation = await self.desk.index.create(kind, model)

        def note(tx: Transaction) -> int:
            filled = had is not None or kind in ledger.incarnations(tx)  # an earlier try may have dropped it already
            ledger.void(tx, kind)
            ledger.remember(tx, kind, incarnation, version=0, model=model.name)
            return queue.requeue_kind(tx, kind, now_milliseconds=now_milliseconds()) if filled else 0

        count = await self.desk.database.awrite(note)
        logger.info("table_created kind={} model={} requeued={}", kind, model.name, count)
        self.desk.wake_up()


def _has_ready(tx: Transaction) -> bool:
    if queue.ready(tx):
        return True
    now = now_milliseconds()
    due = queue.next_due(tx, now_milliseconds=now)
    return due is not None and due <= now


def _note_outage(tx: Transaction, *, reason: str | None, now_milliseconds: int) -> None:
    meta.note_outage(tx, reason, now_milliseconds=now_milliseconds)
    if reason is None:
        queue.hurry(tx, "embedder")


async def _poll(desk: Desk) -> None:
    """The net under the wake-ups: another process' commit moves the data version."""
    last = await desk.database.data_version()
    while True:
        await trio.sleep(desk.settings.worker_poll_interval_seconds)
        version = await desk.database.data_version()
        if version != last:
            last = version
            desk.wake_up()


def _dead(desk: Desk, owners: list[str]) -> set[str]:
    try:
        return locks.dead_owners(desk.settings.engine_directory / "owners", owners)
    except OSError as error:
        if not desk.starved(error):
            raise
        return set()  # nobody can be looked at now; the next round does


async def _reap(desk: Desk) -> None:
    """Take back what dead processes held."""
    while True:
        others = [owner for owner in await desk.database.aread(queue.owners) if owner != desk.owner]
        if others:
            count = await desk.database.awrite(partial(queue.recover, dead_owners=_dead(desk, others)))
            if count:
                logger.info("cascade_recovered_orphan_processing count={}", count)
                desk.wake_up()
        await trio.sleep(REAP_SECONDS)
