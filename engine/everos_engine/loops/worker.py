"""The worker: claim changes, read, diff, embed what is new, commit once per kind, and mark.

Stages overlap. While one batch waits for its vectors the next is read. A job with all of its vectors is committed
with the other ready ones, so that a slow text or a bad file never holds up its neighbours.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from loguru import logger
from trio_util import AsyncValue

from everos_engine.errors import (
    BadFile,
    BadText,
    Damaged,
    EngineError,
    Exhausted,
    Fatal,
    RootAway,
    SettingsError,
    Transient,
    Unavailable,
    Unexpected,
    exhausted,
)
from everos_engine.loops.acknowledge import Written, mark
from everos_engine.loops.context import Context, now_milliseconds, wait_moved
from everos_engine.loops.deletion_guard import to_hold
from everos_engine.loops.job import Job, defer, keep, looks_truncated, refuse, unsettled
from everos_engine.loops.recovery import expect_root, heal, reconcile_table, recreate_table
from everos_engine.loops.vectors import MODEL_CHANGED
from everos_engine.stores import held, ledger, meta, queue
from everos_engine.stores.database import Transaction
from everos_engine.stores.held import REMEDY, WHY
from everos_engine.stores.lance import Model, Row, TableDamaged, Unrecognised
from everos_engine.system import files, locks
from everos_engine.system.file_threads import Call, Calls
from everos_engine.system.unit import Unit, unit
from everos_engine.text import diff, kinds

T = TypeVar("T")
COMMIT_ENTRIES = 8192
REWRITES = frozenset({"sync_path", "rebuild"})
"""Sources of changes whose rows are all written again, even if the ledger has them: `sync PATH`, a new table."""
REAP_SECONDS = 30.0
HELD_FACTOR = 4
HELD_BYTES = 32 << 20
"""Markdown in work before no more is read. What is made of it takes several times as much memory."""
ENTRY_BYTES = 1 << 10
"""What an entry takes in addition to its text."""
READ_BYTES = 8 << 20
IDLE_SECONDS = 60.0
FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
"""The longest delay between two tries of a statement that fails because of the surroundings."""
MAX_QUOTED = 200
UNAVAILABLE = "database_unavailable"
UNAVAILABLE_REMEDY = "free space on the disk, or end the process that holds the lock. Nothing is lost, and it is tried again all the time"


async def work(context: Context) -> None:
    """Serve the queue until cancelled, and then hand back all claims.

    A claim is in SQLite first and in memory second, and leaves them in the same order. Two repairs serve a failure in
    between. A worker that starts takes back what an earlier worker of this engine held. A claim in SQLite that no task
    holds is handed back within REAP_SECONDS.
    """
    worker = _Worker(context)
    await worker.take_back()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.commit_loop)
            nursery.start_soon(worker.return_loop)
            nursery.start_soon(_poll, context)
            nursery.start_soon(worker.reap)
            nursery.start_soon(worker.take_up_answered)
            nursery.start_soon(worker.attend)
            await worker.claim_loop()
    finally:
        with trio.CancelScope(shield=True):
            try:
                await worker.take_back()
            except EngineError as error:  # the next worker, or the next engine, takes them back
                logger.warning("claims_kept error={!r}", str(error))


class _Worker:
    """One run of the work loop. ``in_hand`` are its claims by number, with the bytes that were read for each."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.in_hand: dict[int, int] = {}
        self.held = AsyncValue(0)
        self.held_bytes = AsyncValue(0)
        self.claiming = trio.Lock()
        self.returning: AsyncValue[tuple[Job, ...]] = AsyncValue(())
        self.epoch = 0
        self.ready, self.ready_jobs = trio.open_memory_channel["Job | None"](4 * context.settings.worker_batch_max)

    async def take_back(self) -> None:
        """Hand back every claim of this engine."""
        count = await self.context.database.awrite(lambda tx: queue.recover(tx, [self.context.owner]))
        if count:
            logger.info("claims_taken_back count={}", count)

    async def claim_loop(self) -> None:
        settings, context = self.context.settings, self.context
        async with trio.open_nursery() as nursery:
            while True:
                seen = context.wake.value
                self._beat()
                await self._breathe()
                while claims := await self._patiently(self._claim):
                    self._beat()
                    nursery.start_soon(self._prepare, claims, nursery)
                    most = max(1.0, HELD_FACTOR * settings.worker_batch_size * context.pressure.value)
                    await self.held.wait_value(lambda held, most=most: held < most)
                    await self._breathe()
                due = await self._patiently(self._next_due)
                pause = IDLE_SECONDS if due is None else min(IDLE_SECONDS, max(0.0, (due - now_milliseconds()) / 1000))
                await wait_moved(context.wake, seen, at_most_seconds=pause)

    async def _next_due(self) -> int | None:
        due = partial(
            queue.next_due,
            now_milliseconds=now_milliseconds(),
            longest_wait_milliseconds=_longest_wait_milliseconds(self.context),
        )
        return await self.context.database.aread(due)

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` on the database, and repeat it while the surroundings prevent it. Report that meanwhile."""
        delay, context = FIRST_DELAY_SECONDS, self.context
        while True:
            try:
                result = await work()
            except Damaged:
                raise
            except Transient as error:
                context.starved(error)
                self._beat()
                await context.conditions.say(UNAVAILABLE, str(error), UNAVAILABLE_REMEDY)
                await trio.sleep(delay * (1 + random.random() / 4))  # noqa: S311 - spreads tries
                delay = min(2 * delay, MAX_DELAY_SECONDS)
            else:
                await context.conditions.over(UNAVAILABLE)
                return result

    @contextmanager
    def _unit(self, what: str, claims: Callable[[], Iterable[queue.Claim]]) -> Iterator[Unit]:
        """Hand ``claims`` back if the block fails.

        They are asked for only then. A bug costs each of them an attempt.
        """
        try:
            with unit("work", what) as done:
                yield done
        except Exception as error:  # a unit lets through only what the doors raise
            if _decides(error):
                raise
            self._hand_back(claims(), error)
        if done.error is not None:
            self._hand_back(claims(), done.error, counts_as_retry=True)

    def _hand_back(self, claims: Iterable[queue.Claim], error: BaseException, *, counts_as_retry: bool = False) -> None:
        """Hand back a failed unit's claims. The error comes from the surroundings, unless it counts as an attempt."""
        jobs = tuple(Job(claim) for claim in claims)
        if not jobs:
            return
        self.context.starved(error)
        if counts_as_retry:
            reason = Transient(f"internal error: {ascii(error)[:MAX_QUOTED]}")
        elif isinstance(error, Transient) and not error.counts_as_retry:
            reason = error
        else:
            reason = Transient(str(error), counts_as_retry=False)
        for job in jobs:
            job.error = reason
        logger.warning("claims_handed_back count={} error={!r}", len(jobs), str(reason))
        self.returning.value += jobs

    async def return_loop(self) -> None:
        """Hand back what failed units held.

        It counts as claimed until SQLite has taken it, so that no more is claimed than fits.
        """
        while True:
            await self.returning.wait_value(bool)
            jobs = self.returning.value
            await self._patiently(
                partial(
                    self.context.database.awrite,
                    partial(mark, context=self.context, kind="", jobs=list(jobs), written=None),
                )
            )
            self.returning.value = self.returning.value[len(jobs) :]
            self._let_go(jobs)
            self.context.wake_up()
            self.context.applied.value += 1

    def _let_go(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.in_hand.pop(job.claim.claim_no, None)
        self._count()

    def _count(self) -> None:
        self.held.value, self.held_bytes.value = len(self.in_hand), sum(self.in_hand.values())

    async def reap(self) -> None:
        """Take back what dead processes held, and claims of this engine in SQLite that no task of it holds."""
        context = self.context
        while True:
            try:
                count = await self._reap_dead() + await self._reap_lost()
            except Damaged:
                raise
            except Transient as error:  # the next round does it
                context.starved(error)
            else:
                if count:
                    logger.info("cascade_recovered_orphan_processing count={}", count)
                    context.wake_up()
            await context.conditions.keep()
            await trio.sleep(REAP_SECONDS)

    async def take_up_answered(self) -> None:
        """Make the change that waits for its file ready when a late look has returned."""
        context, seen = self.context, self.context.threads.returned.value
        while True:
            seen = await context.threads.returned.wait_value(lambda value, seen=seen: value != seen)
            await self._patiently(lambda: context.database.awrite(lambda tx: queue.hurry(tx, "file")))
            context.wake_up()

    async def _reap_dead(self) -> int:
        context = self.context
        others = [owner for owner in await context.database.aread(queue.owners) if owner != context.owner]
        return (
            await context.database.awrite(partial(queue.recover, dead_owners=_dead(context, others))) if others else 0
        )

    async def _reap_lost(self) -> int:
        context = self.context
        async with self.claiming:
            ours = await context.database.aread(lambda tx: queue.claimed(tx, context.owner))
            lost = [number for number in ours if number not in self.in_hand]
            return await context.database.awrite(lambda tx: queue.hand_back(tx, context.owner, lost)) if lost else 0

    async def _breathe(self) -> None:
        """Wait with new claims while the guard lets none through."""
        while self.context.pressure.value <= 0:
            self._beat()
            with trio.move_on_after(IDLE_SECONDS):
                await self.context.pressure.wait_value(lambda share: share > 0)

    def _beat(self) -> None:
        """Beat the heart.

        While changes are held the next beat is a commit, which one embedding call and one write may delay.
        """
        settings = self.context.settings
        slowest = settings.embedder.deadline_seconds + settings.lancedb.write_deadline_seconds
        self.context.beat("work", within_seconds=IDLE_SECONDS + slowest)

    async def _claim(self) -> list[queue.Claim]:
        settings = self.context.settings

        share = self.context.pressure.value

        def take(tx: Transaction) -> list[queue.Claim]:
            limit = min(settings.worker_batch_max, max(settings.worker_batch_size, queue.ready(tx)))
            limit = max(1, int(limit * share))
            return queue.claim(
                tx,
                self.context.owner,
                limit=limit,
                now_milliseconds=now_milliseconds(),
                longest_wait_milliseconds=longest,
            )

        longest = _longest_wait_milliseconds(self.context)
        if not await self.context.database.aread(partial(_has_ready, longest_wait_milliseconds=longest)):
            return []
        async with self.claiming:
            claims = await self.context.database.awrite(take)
            self.in_hand |= {claim.claim_no: 0 for claim in claims}
            self._count()
        return claims

    async def _prepare(self, claims: list[queue.Claim], nursery: trio.Nursery) -> None:
        """Read and diff in threads, and send each job on as soon as it needs nothing more.

        No more is read than memory should hold. A file whose read is late is waited for separately, up to its deadline.
        """
        left = list(claims)
        with self._unit("read and compare", lambda: left):
            known = await self.context.database.aread(
                lambda tx: ledger.to_write_again(tx, [claim.md_path for claim in claims])
            )
            jobs = [Job(claim) for claim in claims]
            while jobs:
                await self.held_bytes.wait_value(lambda held: held < HELD_BYTES)
                calls = await self._read_some(jobs)
                jobs = list(calls.rest)
                for call in calls.late:
                    left.remove(call.item.claim)
                    nursery.start_soon(self._await_read, call, known, nursery)
                await self._send_on([_read_of(call) for call in calls.over], known, nursery, left)

    async def _guard_vanished(self, jobs: list[Job]) -> None:
        """Hold the files that vanished between being queued and being read, if too many are gone in all.

        A deletion that was recorded as one has passed the guard already.
        """
        vanished = {job.claim.md_path: job for job in jobs if job.vanished}
        if not vanished:
            return
        now = now_milliseconds()

        def guard(tx: Transaction) -> None:
            holding = to_hold(tx, self.context.settings, list(vanished), now_milliseconds=now)
            held.hold(tx, [(one.md_path, one.kind) for one in holding], "mass_delete", now_milliseconds=now)
            known = queue.fingerprints(tx, [one.md_path for one in holding])
            for one in holding:
                keep(vanished[one.md_path], known[one.md_path])

        await self.context.database.awrite(guard)

    async def _read_some(self, jobs: list[Job]) -> Calls[Job, Job]:
        """Read the first of ``jobs``, as many as fit into READ_BYTES."""
        read_bytes = 0

        def enough(job: Job) -> bool:
            nonlocal read_bytes
            read_bytes += job.size_bytes
            return read_bytes >= READ_BYTES

        root = self.context.settings.root
        named = partial(_path_of, root)
        return await self.context.threads.each(jobs, self._read, what="read", name=named, enough=enough)

    async def _await_read(
        self, call: Call[Job, Job], known: Mapping[str, Mapping[str, bytes]], nursery: trio.Nursery
    ) -> None:
        """Wait for one file's read. If it does not return, its change waits, and no attempt is counted."""
        left = [call.item.claim]
        with self._unit("read and compare", lambda: left):
            try:
                job = await call.wait()
            except Transient as error:
                job = Job(call.item.claim, error=error)  # the thread may still write into the other one
            await self._send_on([job], known, nursery, left)

    async def _send_on(
        self,
        jobs: list[Job],
        known: Mapping[str, Mapping[str, bytes]],
        nursery: trio.Nursery,
        left: list[queue.Claim],
    ) -> None:
        """Parse and diff what was read, and send it on.

        ``left`` are the claims that the caller hands back if this fails.
        """
        self.in_hand |= {job.claim.claim_no: job.size_bytes for job in jobs}
        self._count()
        await trio.to_thread.run_sync(self._parse_all, jobs, known)
        self.in_hand |= {job.claim.claim_no: job.size_bytes for job in jobs}  # with what its entries take
        self._count()
        await self._guard_vanished(jobs)
        await self._look_up(jobs)
        for job in jobs:
            left.remove(job.claim)
            if job.error is None and job.missing and self.context.vectors.breaker is not None:
                nursery.start_soon(self._embed, job)
            else:
                await self.ready.send(job)

    def _parse_all(self, jobs: list[Job], known: Mapping[str, Mapping[str, bytes]]) -> None:
        """Parse and diff what was read."""
        for job in jobs:
            before = known[job.claim.md_path]
            if job.error is None:
                self._parse(job)
            if job.error is None:
                job.plan = diff.plan(job.document, before)
            if looks_truncated(job, before):
                job.error = unsettled(job, self.context.settings.settle_milliseconds) or job.error
            if job.error is None and job.claim.source in REWRITES:
                job.plan = diff.plan(job.document, dict.fromkeys(before, ledger.UNKNOWN))

    def _read(self, job: Job) -> Job:
        """Read the file of a change, or find that it is gone. Changes nothing but the job."""
        settings, claim = self.context.settings, job.claim
        place = kinds.recognise(claim.md_path, note_globs=settings.note.globs)
        if place is None:
            return job  # no kind matches it any more, and its rows go
        try:
            reading = files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
            job.fingerprint, job.racy, job.digest = reading.fingerprint, reading.racy, reading.digest
            job.size_bytes = sum(map(len, reading.sources.values()))
            job.is_empty = not all(reading.sources.values())
            job.place, job.sources = place, reading.sources
        except files.Vanished:
            job.error = self._deletable()
            job.vanished = job.error is None
        except BadFile as error:
            job.error = error
            try:
                job.fingerprint = files.fingerprint(settings.root, place)
            except Transient as unseen:
                job.error = unseen
        except (Transient, OSError) as error:
            job.error = error if isinstance(error, Transient) else Transient(f"reading failed: {error}")
            if claim.source == "release" and files.is_out_of_reach(job.error):
                job.error = self._deletable()  # a person decided that what cannot be looked at is gone
        except Exception as error:  # noqa: BLE001 - a bug one file reveals must not stop the memory of everyone else
            job.error = _bug(claim.md_path, error)
        return job

    def _parse(self, job: Job) -> None:
        """Parse what was read."""
        if job.place is None:
            return
        try:
            job.document = kinds.parse(job.place, job.sources)
            job.size_bytes += ENTRY_BYTES * len(job.document.entries)
            job.problems = list(job.document.problems)
        except BadFile as error:
            job.error = error
        except Exception as error:  # noqa: BLE001 - a bug one file reveals must not stop the memory of everyone else
            job.error = _bug(job.claim.md_path, error)
        finally:
            job.sources = {}

    def _deletable(self) -> Transient | None:
        """Return why the rows of a missing file may not be deleted now, or None if they may."""
        try:
            trouble = self.context.deletion_guard.trouble()
        except Exhausted as error:
            return error
        if trouble in {None, "root_empty"}:
            return None
        return RootAway(f"not deleted: {WHY[trouble]}; {REMEDY[trouble]}")

    async def _look_up(self, jobs: list[Job]) -> None:
        texts = list(dict.fromkeys(text for job in jobs if job.error is None for text in job.missing))
        try:
            known = await self.context.vectors.cached(texts)
        except Transient as error:
            for job in jobs:
                if job.error is None and job.missing:
                    defer(job, dict.fromkeys(job.missing, error))
            return
        for job in jobs:
            job.vectors = {text: known[text] for text in job.missing if text in known}
            job.epoch = self.context.vectors.epoch

    async def _embed(self, job: Job) -> None:
        with self._unit("embed", lambda: [job.claim]):
            await self._embed_missing(job)
            await self.ready.send(job)

    async def _embed_missing(self, job: Job) -> None:
        missing = job.missing
        refused: dict[str, EngineError] = {}
        later: dict[str, Transient] = {}
        for text, outcome in zip(missing, await self.context.vectors.embed(missing), strict=True):
            if isinstance(outcome, BadText):
                refused[text] = outcome
            elif isinstance(outcome, Transient):
                later[text] = outcome
            else:
                job.vectors[text] = outcome
        if refused:
            refuse(job, refused)
        if later:
            defer(job, later)

    async def attend(self) -> None:
        """Report the embedding service's outages. Have the changes that waited for it done as soon as it answers."""
        context, breaker = self.context, self.context.vectors.breaker
        if breaker is None:
            return

        async def note() -> str | None:
            reason: str | None = breaker.down.value
            await context.database.awrite(partial(_note_outage, reason=reason, now_milliseconds=now_milliseconds()))
            return reason

        async with aclosing(breaker.down.eventual_values()) as reasons:
            async for _ in reasons:
                if await self._patiently(note) is None:
                    try:
                        if context.index.open_kinds():
                            await context.vectors.model()
                        await self.ready.send(None)
                    except Damaged:
                        raise
                    except Transient as error:  # the next batch of jobs asks again
                        context.starved(error)
                    context.wake_up()

    async def _renew(self) -> None:
        """Recreate the table of every kind whose vectors come from a model that no longer answers.

        Two models never share a table.
        """
        vectors = self.context.vectors
        if vectors.epoch in {0, self.epoch}:
            return
        model = await vectors.model()
        for kind in self.context.index.open_kinds():
            if self.context.index.model_of(kind) != model.name:
                async with self.context.table(kind):
                    await self._recreate_table(kind, model)
        self.epoch = vectors.epoch

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
            by_kind: dict[str, list[Job]] = defaultdict(list)
            for job in jobs:
                by_kind[job.claim.kind].append(job)
            with trio.CancelScope(shield=True):
                with self._unit("renew tables", list):
                    await self._renew()
                for of_kind in by_kind.values():
                    await self._commit_apart(of_kind)
            self._beat()
            self.context.applied.value += 1

    async def _commit_apart(self, jobs: list[Job]) -> None:
        """Commit jobs together. After a bug, commit each by itself, so that one of them does not hold up the others."""
        together = Unit()
        try:
            with unit("work", f"commit {len(jobs)} changes") as together:
                await self._commit(jobs)
                self._let_go(jobs)
        except Exception as error:  # a unit lets through only what the doors raise
            if _decides(error):
                raise
            self._hand_back([job.claim for job in jobs], error)
        if together.error is None:
            return
        if len(jobs) == 1:
            self._hand_back([jobs[0].claim], together.error, counts_as_retry=True)
            return
        for job in jobs:
            await self._commit_apart([job])

    async def _commit(self, jobs: list[Job]) -> None:
        """Commit each kind once. A kind in trouble postpones its own jobs only."""
        by_kind: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_kind[job.claim.kind].append(job)
        for kind, of_kind in by_kind.items():
            async with self.context.table(kind):
                written = await self._commit_kind(kind, of_kind)
            self.context.wake_up()  # one edited meanwhile is ready again, one postponed has a time it is due
            self.context.progress.applied += len(of_kind)
            if written is not None:
                self.context.progress.commits[kind] = self.context.progress.commits.get(kind, 0) + 1

    async def _commit_kind(self, kind: str, jobs: list[Job]) -> Written | None:
        """Commit one kind's jobs, and mark them. No other task may look at the table between the two."""
        writing = [job for job in jobs if job.error is None and (job.plan.upserts or job.plan.deletes)]
        written = await self._try_to_write(kind, writing) if writing else None
        for job in jobs:
            if isinstance(job.error, Transient) and self.context.starved(job.error):
                job.error = Exhausted(str(job.error))
            if job.deferred is not None and self.context.starved(job.deferred):
                job.deferred = Exhausted(str(job.deferred))
        await self.context.database.awrite(partial(mark, context=self.context, kind=kind, jobs=jobs, written=written))
        return written

    async def _try_to_write(self, kind: str, jobs: list[Job]) -> Written | None:
        """Commit to a kind's table. If that fails, repair the table if needed, and give each job the reason."""
        try:
            await expect_root(self.context)
            if kind in self.context.unchecked:
                await reconcile_table(self.context, kind)
            if kind in self.context.index.shunned:
                raise TableDamaged(f"the table {kind!r} is damaged: {self.context.index.shunned[kind]}")
            return await self._write(kind, jobs)
        except Damaged:
            raise
        except Transient as failure:
            error = failure
            try:
                if not await heal(self.context, kind, failure) and isinstance(failure, Unexpected):
                    return await self._write_one_by_one(kind, jobs)
            except Damaged:
                raise
            except Transient as lost:
                error = lost
            for job in jobs:
                job.error = error
            return None

    async def _write_one_by_one(self, kind: str, jobs: list[Job]) -> Written | None:
        """Commit each job by itself to a sound table.

        A job whose rows LanceDB refuses then does not hold up the others. A job is to blame, and loses an attempt, only
        if the table accepts a commit that changes nothing.
        """
        written = None
        for job in jobs:
            try:
                written = await self._write(kind, [job]) or written
                if written is not None:
                    await self._move_on(kind, written)
            except Damaged:
                raise
            except Unexpected as error:
                job.error = Transient(str(error)) if await self._takes_commits(kind) else error
            except Transient as error:
                job.error = error
        return written

    async def _takes_commits(self, kind: str) -> bool:
        known = (await self.context.database.aread(ledger.incarnations)).get(kind)
        if known is None:
            return False
        try:
            version = await self.context.index.commit(kind, [], [("", "")], left=known.version)
        except Transient:
            return False
        await self._move_on(kind, Written(known.incarnation, version))
        return True

    async def _move_on(self, kind: str, written: Written) -> None:
        """Record a version before the batch is marked. The next commit compares the table with what is recorded."""
        await self.context.database.awrite(
            lambda tx: ledger.moved_on(tx, kind, written.incarnation, version=written.version)
        )

    async def _write(self, kind: str, jobs: list[Job]) -> Written | None:
        """Commit once to the kind's table. Returns None if only unknown keys without a table were to be deleted."""
        index, database = self.context.index, self.context.database
        rows = [
            Row(job.claim.md_path, entry.entry_id, entry.content_hash, entry.values, job.vectors.get(entry.embed_text))
            for job in jobs
            for entry in job.plan.upserts
        ]
        deletes = [(job.claim.md_path, entry_id) for job in jobs for entry_id in job.plan.deletes]
        if index.model_of(kind) is None and not rows:
            return None
        if rows:
            model = await self.context.vectors.model()
            if any(job.vectors and job.epoch != self.context.vectors.epoch for job in jobs):
                raise Unavailable(MODEL_CHANGED)
            if index.model_of(kind) != model.name:
                await self._recreate_table(kind, model)

        def intend(tx: Transaction) -> ledger.Remembered | None:
            for job in jobs:
                touched = [entry.entry_id for entry in job.plan.upserts] + list(job.plan.deletes)
                ledger.intend(tx, job.claim.md_path, kind, touched)
            return ledger.incarnations(tx).get(kind)

        known, incarnation = await database.awrite(intend), index.incarnation_of(kind)
        if known is None or known.incarnation != incarnation:
            raise Unrecognised(f"the table {kind!r} is not the one that the ledger speaks of")
        return Written(incarnation, await index.commit(kind, rows, deletes, left=known.version))

    async def _recreate_table(self, kind: str, model: Model) -> None:
        """Create a table for ``model``. The kind's old rows go, and its files come again with their cached vectors."""
        count = await recreate_table(self.context, kind, model)
        logger.info("table_created kind={} model={} requeued={}", kind, model.name, count)


def _decides(error: BaseException) -> bool:
    """Return whether an error is for the supervisor: the stores must be opened again, or the process must end."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup((Damaged, Fatal, SettingsError)) is not None
    return isinstance(error, (Damaged, Fatal, SettingsError))


def _path_of(root: Path, job: Job) -> str:
    return files.path_of(root, job.claim.md_path)


def _read_of(call: Call[Job, Job]) -> Job:
    """Return the job of a call that is over, with the reason if it was not begun."""
    try:
        return call.get()
    except Transient as error:
        return Job(call.item.claim, error=error)


def _bug(md_path: str, error: Exception) -> EngineError:
    """Return what an error that no parser should raise means for its file."""
    if exhausted(error):
        return Exhausted(f"reading failed: {error}")
    logger.opt(exception=error).error("parser_bug path={}", md_path)
    return BadFile(
        f"internal error: {ascii(error)[:MAX_QUOTED]}", remedy="please report this file's shape; an edit tries again"
    )


def _longest_wait_milliseconds(context: Context) -> int:
    """Return the longest delay that a change can get.

    It is the largest backoff with its jitter, or what a service may ask for.
    """
    by_settings = int(1250 * context.settings.worker_retry_backoff_max_seconds)
    return max(by_settings, queue.LONGEST_WAIT_MILLISECONDS)


def _has_ready(tx: Transaction, *, longest_wait_milliseconds: int) -> bool:
    if queue.ready(tx):
        return True
    now = now_milliseconds()
    due = queue.next_due(tx, now_milliseconds=now, longest_wait_milliseconds=longest_wait_milliseconds)
    return due is not None and due <= now


def _note_outage(tx: Transaction, *, reason: str | None, now_milliseconds: int) -> None:
    meta.note_outage(tx, reason, now_milliseconds=now_milliseconds)
    if reason is None:
        queue.hurry(tx, "embedder")


async def _poll(context: Context) -> None:
    """Look for commits of other processes, in case a wake-up is lost. Such a commit changes the data version."""
    last = None
    while True:
        try:
            version = await context.database.data_version()
        except Damaged:
            raise
        except Transient as error:  # the next look sees what this one missed
            context.starved(error)
        else:
            if last is not None and version != last:
                context.wake_up()
            last = version
        await trio.sleep(context.settings.worker_poll_interval_seconds)


def _dead(context: Context, owners: list[str]) -> set[str]:
    try:
        return locks.dead_owners(context.settings.engine_directory / "owners", owners)
    except OSError as error:
        if not context.starved(error):
            raise
        return set()  # no owner can be looked at now, and the next round does it
