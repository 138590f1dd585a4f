"""The change queue over real SQLite against a dumb model of what was edited, held and applied.

The model knows nothing of rows: it keeps the disk, every lsn handed out, and which of them are settled.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, get_args

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from everos_engine.stores import full_scan, queue, reports
from everos_engine.stores.database import Database
from everos_engine.stores.queue import Claim, Fingerprint4, Observation
from fuzz.scratch import SCRATCH

T = TypeVar("T")
PATHS = [f"p{number}.md" for number in range(3)]
OWNERS = ["one", "two"]
LONGEST_WAIT = 5000
"""Milliseconds: no rule delays a change for longer."""
INDEXES = {
    "change_ready": [
        queue.CLAIM,
        "SELECT min(pos) FROM md_change_state WHERE status = 'pending' AND not_before = 0",
        "SELECT count(*) FROM md_change_state WHERE status = 'pending' AND not_before = 0",
    ],
    "change_delayed": [
        queue.WAKE_DELAYED,
        queue.WAKE_TOO_FAR,
        "SELECT min(not_before) FROM md_change_state WHERE status = 'pending' AND not_before > 0",
    ],
    "change_clock": [queue.WAKE_AFTER_CLOCK, queue.BEGAN_IN_THE_FUTURE],
    "change_claimed": [queue.RELEASE, "SELECT DISTINCT owner FROM md_change_state WHERE status = 'processing'"],
    "idx_md_change_retryable": ["SELECT md_path FROM md_change_state WHERE status = 'failed' AND retryable = 1"],
    "sqlite_autoindex_md_change_state_1": [queue.FORGET, queue.DONE, queue.FAILED, queue.POSTPONE, queue.REQUEUE],
}
"""Which index serves which statement, whatever the table holds."""


@dataclass(frozen=True)
class Look:
    """What reading a path gives: fingerprint (None: no file), content, and whether the next write may leave no trace."""

    fingerprint: Fingerprint4 | None = None
    content: int = 0
    racy: bool = False

    @property
    def digest(self) -> bytes:
        return str(self.content).encode()


@dataclass
class Hold:
    """A claim in a worker's hands, and what it read."""

    claim: Claim
    owner: str
    read: Look | None = None


@dataclass
class Known:
    """What the model knows of one path."""

    disk: Fingerprint4 | None = None
    content: int = 0
    fresh: bool = False
    """Written within the clock's grain: another write may leave the same fingerprint."""
    applied: Look = Look()
    open_lsns: list[int] = field(default_factory=list)
    """Handed out for this path, and neither applied nor dead-lettered."""
    failed: bool | None = None
    """retryable, where the newest change is dead-lettered."""
    not_before: int = 0
    delayed_at: int = 0
    """What the clock said when the delay began."""
    lower_bound: int = 0
    """What the oldest open change is at least; the queue may say less than the truth, never more."""
    held: bool = False

    def look(self) -> Look:
        return Look(self.disk, self.content if self.disk else 0, bool(self.disk) and self.fresh)


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="everos-fuzz-", dir=SCRATCH)
        self.database = Database(Path(self.directory) / "engine.db", schema=queue.SCHEMA)
        self.paths = {path: Known() for path in PATHS}
        self.holds: list[Hold] = []
        self.zombies: list[Hold] = []
        self.lsns: set[int] = set()
        self.claim_numbers: set[int] = set()
        self.version = 0
        self.now = 1000
        self.last_watermark = 0

    def teardown(self) -> None:
        try:
            self.partial_indexes_serve()
            self.drain()
        finally:
            self.database.close()
            shutil.rmtree(self.directory)

    # the world

    @rule(path=st.sampled_from(PATHS))
    def edit(self, path: str) -> None:
        self.version += 1
        known = self.paths[path]
        known.disk = (self.version, self.version % 3, self.version % 2, self.version)
        known.content, known.fresh = self.version, True

    @rule(path=st.sampled_from(PATHS))
    def edit_without_a_trace(self, path: str) -> None:
        if self.paths[path].disk and self.paths[path].fresh:
            self.version += 1
            self.paths[path].content = self.version

    @rule()
    def the_clock_ticks(self) -> None:
        for known in self.paths.values():
            known.fresh = False

    @rule(path=st.sampled_from(PATHS), gone=st.booleans())
    def edit_and_tell(self, path: str, gone: bool) -> None:
        self.edit(path)
        if gone:
            self.paths[path].disk = None
        self.record([path], force=False, source="watch")

    @rule(path=st.sampled_from(PATHS))
    def delete(self, path: str) -> None:
        self.paths[path].disk = None

    @rule(path=st.sampled_from(PATHS))
    def come_back_as_before(self, path: str) -> None:
        known = self.paths[path]
        if known.disk is None and known.applied.fingerprint is not None:
            known.disk, known.content, known.fresh = known.applied.fingerprint, known.applied.content, True

    @rule(milliseconds=st.integers(1, 3000))
    def time_passes(self, milliseconds: int) -> None:
        self.now += milliseconds

    @rule(milliseconds=st.integers(-100_000_000, 100_000_000))
    def the_clock_is_set(self, milliseconds: int) -> None:
        self.now = max(1, self.now + milliseconds)

    @rule()
    def time_passes_until_the_first_is_due(self) -> None:
        due = self.next_due()
        waiting = [known for known in self.paths.values() if known.not_before and not known.held]
        if any(known.delayed_at > self.now for known in waiting):
            assert due is not None
            assert due <= self.now
        else:
            assert due == min((known.not_before for known in waiting), default=None)
        self.now = max(self.now, due or 0)

    def next_due(self) -> int | None:
        return self.read(lambda tx: queue.next_due(tx, now_milliseconds=self.now))

    @invariant()
    def nothing_waits_longer_than_the_longest_delay(self) -> None:
        """The clock may have been set by any amount in either direction."""
        due = self.next_due()
        assert due is None or due <= self.now + LONGEST_WAIT

    # what finds changes

    @rule(
        paths=st.lists(st.sampled_from(PATHS), min_size=1, unique=True),
        force=st.booleans(),
        source=st.sampled_from(["watch", "scan", "sync", "rebuild"]),
        settle=st.sampled_from([0, 0, 700]),
    )
    def record(self, paths: list[str], force: bool, source: queue.Source, settle: int = 0) -> None:
        seen = [Observation(path, "note", self.paths[path].disk) for path in paths]
        self.recorded(
            lambda tx: queue.record(
                tx, seen, source=source, now_milliseconds=self.now, force=force, settle_milliseconds=settle
            ),
            must=set(paths) if force else set(),
            settle=0 if force else settle,
        )
        again = self.write(lambda tx: queue.record(tx, seen, source=source, now_milliseconds=self.now))
        assert again == []

    @rule()
    def sweep(self) -> None:
        seen = [Observation(path, "note", known.disk) for path, known in self.paths.items() if known.disk]
        self.write(lambda tx: full_scan.load_full_scan(tx, seen))

        def both(tx: queue.Transaction) -> list[str]:
            same = [(one, digest) for one, digest in full_scan.racy(tx) if self.is_same(one, digest)]
            full_scan.trust(tx, [(one, digest) for one, digest in same if not self.paths[one.md_path].fresh])
            compared = full_scan.record_full_scan(
                tx, source="scan", now_milliseconds=self.now, verified=frozenset(one for one, _ in same)
            )
            gone = [Observation(one.md_path, "note", self.paths[one.md_path].disk) for one in compared.vanished]
            return compared.queued + queue.record(tx, gone, source="scan", now_milliseconds=self.now)

        self.recorded(both, must=set())

    def is_same(self, seen: Observation, digest: bytes) -> bool:
        look = self.paths[seen.md_path].look()
        return look.fingerprint == seen.fingerprint and look.digest == digest

    def recorded(self, work: object, must: set[str], settle: int = 0) -> None:
        before, delays = self.read(queue.newest), self.delays()
        queued = self.write(work)  # type: ignore[arg-type]
        newest = self.read(queue.newest)
        assert newest - before == len(queued) == len(set(queued))
        assert must <= set(queued)
        for offset, path in enumerate(queued):
            lsn, known = before + 1 + offset, self.paths[path]
            assert lsn not in self.lsns
            self.lsns.add(lsn)
            if not known.open_lsns:
                known.lower_bound = lsn
            known.open_lsns.append(lsn)
            known.failed = None
            known.not_before, known.delayed_at = self.delays()[path], self.now
            if known.not_before:
                assert settle, "a change that need not settle is ready at once"
                assert known.not_before <= max(delays.get(path, 0), self.now + settle)

    def delays(self) -> dict[str, int]:
        return self.read(lambda tx: dict(tx.execute("SELECT md_path, not_before FROM md_change_state")))

    # what works on them

    @rule(owner=st.sampled_from(OWNERS), limit=st.integers(1, 4))
    def claim(self, owner: str, limit: int) -> None:
        claimable = {
            path: known.lower_bound
            for path, known in self.paths.items()
            if known.open_lsns and not known.held and (known.not_before <= self.now or known.delayed_at > self.now)
        }
        claims = self.write(lambda tx: queue.claim(tx, owner, limit=limit, now_milliseconds=self.now))
        assert [claimable[held.md_path] for held in claims] == sorted(claimable.values())[:limit]
        assert len({held.md_path for held in claims}) == len(claims)
        for held in claims:
            known = self.paths[held.md_path]
            assert held.claim_no not in self.claim_numbers
            assert held.claim_lsn == known.open_lsns[-1]
            self.claim_numbers.add(held.claim_no)
            known.held, known.not_before = True, 0
            self.holds.append(Hold(held, owner))

    @precondition(lambda self: self.holds)
    @rule(which=st.integers(0, 99))
    def worker_reads(self, which: int) -> None:
        hold = self.holds[which % len(self.holds)]
        hold.read = self.paths[hold.claim.md_path].look()

    @precondition(lambda self: self.holds)
    @rule(which=st.integers(0, 99), settle=st.sampled_from([0, 0, 700]))
    def mark_done(self, which: int, settle: int) -> None:
        hold = self.holds.pop(which % len(self.holds))
        known = self.paths[hold.claim.md_path]
        read = hold.read or known.look()
        self.write(lambda tx: self.done(tx, hold.claim, read, settle))
        known.applied = read
        self.settle(hold, known, settle)

    def done(self, tx: queue.Transaction, held: Claim, read: Look, settle: int) -> None:
        queue.mark_done(
            tx,
            held,
            read.fingerprint,
            racy=read.racy,
            digest=read.digest,
            now_milliseconds=self.now,
            settle_milliseconds=settle,
        )

    @precondition(lambda self: self.holds)
    @rule(which=st.integers(0, 99), retryable=st.booleans())
    def mark_failed(self, which: int, retryable: bool) -> None:
        hold = self.holds.pop(which % len(self.holds))
        known = self.paths[hold.claim.md_path]
        read = hold.read or Look()
        self.write(
            lambda tx: queue.mark_failed(
                tx,
                hold.claim,
                "no",
                retryable=retryable,
                fingerprint=read.fingerprint,
                racy=read.racy,
                digest=read.digest if read.fingerprint else None,
                now_milliseconds=self.now,
            )
        )
        known.failed = retryable if known.open_lsns[-1] == hold.claim.claim_lsn else None
        self.settle(hold, known)

    @precondition(lambda self: self.holds)
    @rule(
        which=st.integers(0, 99),
        delay=st.integers(1, LONGEST_WAIT),
        counts=st.booleans(),
        waits_for=st.sampled_from(get_args(queue.WaitsFor)),
    )
    def postpone(self, which: int, delay: int, counts: bool, waits_for: queue.WaitsFor) -> None:
        hold = self.holds.pop(which % len(self.holds))
        known = self.paths[hold.claim.md_path]
        later = self.now + delay
        self.write(
            lambda tx: queue.postpone(
                tx,
                hold.claim,
                "later",
                not_before=later,
                now_milliseconds=self.now,
                waits_for=waits_for,
                counts_as_retry=counts,
            )
        )
        known.held, known.delayed_at = False, self.now
        known.not_before = later if known.open_lsns[-1] == hold.claim.claim_lsn else 0

    @rule(waits_for=st.sampled_from(get_args(queue.WaitsFor)))
    def hurry(self, waits_for: queue.WaitsFor) -> None:
        sql = "SELECT md_path FROM md_change_state WHERE waits_for = ?"
        hurried = self.read(lambda tx: [path for (path,) in tx.execute(sql, (waits_for,))])
        self.write(lambda tx: queue.hurry(tx, waits_for))
        for path in hurried:
            self.paths[path].not_before = 0
        assert self.read(lambda tx: list(tx.execute(sql, (waits_for,)))) == []

    def settle(self, hold: Hold, known: Known, settle: int = 0) -> None:
        known.held, known.delayed_at = False, self.now
        known.open_lsns = [lsn for lsn in known.open_lsns if lsn > hold.claim.claim_lsn]
        known.lower_bound = hold.claim.claim_lsn + 1
        known.not_before = self.now + settle if known.open_lsns and settle else 0

    @rule(owner=st.sampled_from(OWNERS))
    def owner_dies(self, owner: str) -> None:
        mine = [hold for hold in self.holds if hold.owner == owner]
        assert self.write(lambda tx: queue.recover(tx, [owner])) == len(mine)
        for hold in mine:
            self.holds.remove(hold)
            self.zombies.append(hold)
            self.paths[hold.claim.md_path].held = False

    @precondition(lambda self: self.zombies)
    @rule(which=st.integers(0, 99), how=st.sampled_from(["done", "failed", "postponed"]))
    def a_dead_hand_marks(self, which: int, how: str) -> None:
        """A hold that was taken back may still be marked, late: it changes nothing."""
        held = self.zombies[which % len(self.zombies)].claim
        before = self.rows()
        if how == "done":
            self.write(lambda tx: queue.mark_done(tx, held, None, racy=False, now_milliseconds=self.now))
        elif how == "failed":
            self.write(lambda tx: queue.mark_failed(tx, held, "x", retryable=True, now_milliseconds=self.now))
        else:
            self.write(lambda tx: queue.postpone(tx, held, "x", not_before=self.now + 1, now_milliseconds=self.now))
        assert self.rows() == before

    @rule()
    def fix(self) -> None:
        failed = {path for path, known in self.paths.items() if known.failed}
        before = self.read(queue.newest)
        paths = self.write(lambda tx: queue.requeue_failed(tx, now_milliseconds=self.now))
        assert set(paths) == failed
        assert len(paths) == len(failed)
        for offset, path in enumerate(paths):
            known = self.paths[path]
            known.failed = None
            known.lower_bound = before + 1 + offset
            known.open_lsns = [before + 1 + offset]
            self.lsns.add(before + 1 + offset)

    # what always holds

    @invariant()
    def numbers_agree(self) -> None:
        counts = self.read(reports.counts)
        paths = self.paths.values()
        assert counts.processing == sum(known.held for known in paths) == len(self.holds)
        assert counts.pending == sum(bool(known.open_lsns) and not known.held for known in paths)
        assert counts.failed_retryable == sum(known.failed is True for known in paths)
        assert counts.failed_permanent == sum(known.failed is False for known in paths)
        assert counts.lsn_max == max(self.lsns, default=0) == len(self.lsns)

    @invariant()
    def the_watermark_is_true(self) -> None:
        counts = self.read(reports.counts)
        waiting = [known for known in self.paths.values() if known.open_lsns]
        truth = min((known.open_lsns[0] for known in waiting), default=counts.lsn_max + 1) - 1
        bound = min((known.lower_bound for known in waiting), default=counts.lsn_max + 1) - 1
        assert self.last_watermark <= counts.watermark <= truth
        assert counts.watermark == bound
        self.last_watermark = counts.watermark

    @invariant()
    def rows_are_sound(self) -> None:
        for path, lsn, pos, status, claim_lsn in self.read(
            lambda tx: list(tx.execute("SELECT md_path, lsn, pos, status, claim_lsn FROM md_change_state"))
        ):
            assert pos <= lsn
            assert claim_lsn is None or pos <= claim_lsn <= lsn
            if status in {"pending", "processing"}:
                assert lsn == self.paths[path].open_lsns[-1]

    def partial_indexes_serve(self) -> None:
        for name, statements in INDEXES.items():
            for sql in statements:
                count = max((number for number in range(1, 13) if f"?{number}" in sql), default=sql.count("?"))
                plan = self.read(lambda tx, s=sql, n=count: list(tx.execute("EXPLAIN QUERY PLAN " + s, (1,) * n)))
                told = " | ".join(str(row[-1]) for row in plan)
                assert name in told, f"{sql}: {told}"
                assert not any(str(row[-1]) == "SCAN md_change_state" for row in plan), told

    def drain(self) -> None:
        """Whatever happened: once swept, recovered and worked off, what was applied is what is on disk."""
        for owner in OWNERS:
            self.owner_dies(owner)
        self.sweep()
        self.fix()
        self.now += 1_000_000
        while claims := self.write(lambda tx: queue.claim(tx, "last", limit=3, now_milliseconds=self.now)):
            for held in claims:
                known = self.paths[held.md_path]
                known.applied = known.look()
                self.write(lambda tx, h=held, r=known.applied: self.done(tx, h, r, 0))
        counts = self.read(reports.counts)
        assert counts.watermark == counts.lsn_max
        for path, known in self.paths.items():
            if known.failed is None:
                assert (known.applied.fingerprint, known.applied.content) == (known.disk, known.look().content), path

    def rows(self) -> list[object]:
        return self.read(lambda tx: list(tx.execute("SELECT * FROM md_change_state ORDER BY md_path")))

    def write(self, work: object) -> T:  # type: ignore[type-var]
        return self.database.write(work)  # type: ignore[arg-type]

    def read(self, work: object) -> T:  # type: ignore[type-var]
        return self.database.read(work)  # type: ignore[arg-type]


TestQueue = QueueMachine.TestCase
