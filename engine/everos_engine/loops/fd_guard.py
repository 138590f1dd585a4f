"""The descriptor guard: count every second, and act before the limit is reached.

No task is stopped and no work is lost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio
from loguru import logger

from everos_engine.errors import Transient
from everos_engine.loops.context import Context, Point, now_milliseconds, wait_moved
from everos_engine.loops.fd_self_test import SelfTest, self_test
from everos_engine.loops.memory_guard import Resident
from everos_engine.loops.recovery import expect_root
from everos_engine.settings import DescriptorMode
from everos_engine.stores import meta
from everos_engine.stores.database import Transaction
from everos_engine.stores.lance import LIBRARY
from everos_engine.system import ceiling, descriptors, memory
from everos_engine.system.history_file import HistoryFile
from everos_engine.system.slope import Learner, Slope
from everos_engine.system.unit import unit

BEAT_SECONDS = 1.0
ALLOWANCE_SECONDS = 30.0
MIN_PAUSE_SECONDS = 0.1
CLASSIFY_SECONDS = 10.0
JUMP = 8
WALK_SHARE = 1 / 2000
"""The share of the time that walks of the index folder may take."""
FIRST_REST_SECONDS, MAX_REST_SECONDS = 1.0, 300.0
"""After a rotation that freed nothing, the rest before the next one doubles, from the first value up to the second."""
CALM_SECONDS = 2.0
"""After an exhaustion, new work waits until none was seen for this long."""
BYTES_REST_SECONDS = 5.0
"""The rest between two rotations for the Session's bytes."""
TRIM_SECONDS, TRIM_BYTES = 5.0, 256 << 10
"""How often the allocator is asked to return free memory, and how much must have been added since the last time."""
KEEP_DIFFERENCE = 0.2
"""The share by which a learned slope must differ from the kept one to replace it."""
PROVE_AFTER_SECONDS = 3.0
"""The self-test waits this long after a start, so that the first changes go before it."""
PROVE_AGAIN_SECONDS = 30.0
LAW = "descriptor_law"
LAW_REMEDY = (
    "the engine counts and rotates the Session instead, and stays under its budget; pin the lancedb version it was "
    "tested with, and report the new one"
)
EXHAUSTED_REMEDY = "see `everos-engine fds` for what holds them. Raise `ulimit -n`, or lower lancedb.index_cache_size_bytes in mode pinned"
HISTORY_REMEDY = (
    "free space on its disk, or name another file with lancedb.history_file. The last hour is kept in memory anyway"
)
OVER_REMEDY = f"{EXHAUSTED_REMEDY}. If other programs hold them permanently, raise lancedb.hard_budget_share"


async def guard(context: Context, *, proving: bool = True) -> None:
    """Run the self-test, then look every second, and immediately when no descriptor was left."""
    watcher = Guard(context)
    async with trio.open_nursery() as nursery:
        if proving:
            nursery.start_soon(watcher.learn_slope, PROVE_AFTER_SECONDS)
        nursery.start_soon(watcher.measure_disk)
        nursery.start_soon(watcher.resident.keep_counting)
        with watcher.opened():
            while True:
                context.beat("guard", within_seconds=ALLOWANCE_SECONDS)
                seen = context.exhaustion.value
                with unit("guard", "a look at descriptors"):
                    await watcher.look()
                await trio.sleep(MIN_PAUSE_SECONDS)
                await wait_moved(context.exhaustion, seen, at_most_seconds=BEAT_SECONDS - MIN_PAUSE_SECONDS)


@dataclass(slots=True, eq=False)
class Guard:
    """What the guard knows from one look to the next."""

    context: Context
    count: Callable[[], int] = field(init=False)
    counted_by: str = field(init=False)
    peak: int = 0
    law: SelfTest | None = None
    resident: Resident = field(init=False)
    learner: Learner = field(default_factory=Learner)
    slope: Slope | None = None
    _kept_slope: Slope | None = None
    classes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(descriptors.CLASSES, 0))
    memory: descriptors.Memory = field(default_factory=lambda: descriptors.Memory(0, 0))
    disk: tuple[int, int, int] = (0, 0, 0)
    _classified: tuple[float, int] = (float("-inf"), 0)
    _heard: int = 0
    _rotate_after: float = float("-inf")
    _rest_seconds: float = FIRST_REST_SECONDS
    _before_last: int = 0
    _lowest_since: int = 0
    _rotated_for_bytes: float = float("-inf")
    _was_exhausted: bool = False
    _trimmed: tuple[float, int] = (float("-inf"), 0)
    _trim_due: bool = False
    _history: HistoryFile | None = None
    _history_failed_for: str | None = None

    def __post_init__(self) -> None:
        self.count, self.counted_by = descriptors.counter()
        self.resident = Resident(self.context)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the spare descriptor, and the history file if one is configured."""
        named = self.context.settings.lancedb.history_file
        with ExitStack() as stack:
            self.context.reserve.take()
            stack.callback(self.context.reserve.release)
            if named:
                self._history = HistoryFile(Path(named))
                stack.callback(self._history.close)
            yield

    async def look(self) -> None:
        """Count the descriptors, act if the count is over a budget or none was left, and publish the sample."""
        context, now, count = self.context, time.monotonic(), self.count()
        limit, soft, hard = self._bounds()
        heard, self._heard = context.exhaustion.value != self._heard, context.exhaustion.value
        if count >= limit:
            if now - context.exhausted_at_seconds > CALM_SECONDS:
                context.exhaustion.value += 1
                heard, self._heard = True, context.exhaustion.value
            context.exhausted_at_seconds = now
        self._lowest_since = min(self._lowest_since, count)
        if self._classify(now, count) and self.pinning:
            self._learn_slope(count, soft=soft)
        if heard or count >= limit:
            self._rotate_for_descriptors(now, count, reason="exhausted")
        elif count > soft and self.classes["lance_index"] + self.classes["deleted"]:
            self._rotate_for_descriptors(now, count, reason="over_budget")
        else:  # without pinned indexes a rotation frees bytes only, also where the limit is so low that any count is over
            if count <= soft:
                self._rest_seconds = FIRST_REST_SECONDS
            self._rotate_for_bytes(now, count)
        count = self.count()
        self.peak = max(self.peak, count)
        calm = now - context.exhausted_at_seconds >= CALM_SECONDS
        share = share_of_descriptors(count, soft=soft, hard=hard) if calm else 0.0
        self._press(count, min(share, self.resident.share(self.memory.rss_bytes)))
        with suppress(Transient):
            await self._report(calm=calm, exhausting=share <= 0, limit=limit)
            await self.resident.report(self.memory.rss_bytes, now)
            await self._keep_slope()
        if not context.reserve.held and count < limit - 1:
            context.reserve.take()
        self._publish(count)
        with suppress(Transient):
            await self._say_history()
        await self._trim(now)

    async def _say_history(self) -> None:
        """Report why the history file does not grow, while it does not."""
        if self._history_failed_for is None:
            await self.context.conditions.over("history_file_failed")
            return
        named = self.context.settings.lancedb.history_file
        message = f"the history file {str(named)!r} cannot be written: {self._history_failed_for}"
        await self.context.conditions.say("history_file_failed", message, HISTORY_REMEDY)

    async def _trim(self, now: float) -> None:
        """Return freed memory to the system after growth or after a Session was dropped.

        The allocator keeps what was freed in the middle of a heap until it is asked.
        """
        at, rss_bytes = self._trimmed
        if self._trim_due and self.context.index.sessions_open == 1:
            self._trim_due = False
        elif now - at < TRIM_SECONDS or not (
            self.memory.rss_bytes - rss_bytes >= TRIM_BYTES or self.resident.is_over(self.memory.rss_bytes)
        ):
            return
        await trio.to_thread.run_sync(memory.trim)
        self.memory = descriptors.memory() or self.memory
        self._trimmed = now, self.memory.rss_bytes

    async def learn_slope(self, after_seconds: float = 0.0) -> None:
        """Prove the law of the current mode, once for each version of the library, and report a failure loudly."""
        await trio.sleep(after_seconds)
        context, mode = self.context, self.context.settings.lancedb.descriptor_mode
        law = _kept(await context.database.aread(lambda tx: meta.get(tx, LAW)))
        while law is None or (law.library, law.mode, law.holds) != (LIBRARY, mode, True):
            try:
                law = await self._self_test(mode)
                break
            except (Transient, OSError) as error:
                logger.warning("descriptor_law_unknown in_seconds={} error={!r}", PROVE_AGAIN_SECONDS, str(error))
                await trio.sleep(PROVE_AGAIN_SECONDS)
        self.law = law
        if law.holds:
            await context.conditions.over("descriptor_law_broken")
            return
        message = (
            f"{law.library} pins {law.pinned} index descriptors where lancedb.descriptor_mode={mode} allows {law.bound}"
        )
        await context.conditions.say("descriptor_law_broken", message, LAW_REMEDY)

    async def _self_test(self, mode: DescriptorMode) -> SelfTest:
        context = self.context
        directory = context.settings.engine_directory
        await expect_root(context)
        async with context.index.acquire_read():
            law = await self_test(context.index.bridge, context.index.settings, directory=directory, claimed=mode)
        text = json.dumps(asdict(law))

        def keep(tx: Transaction) -> None:
            meta.put(tx, LAW, text)

        await context.database.awrite(keep)
        return law

    async def measure_disk(self) -> None:
        """Count the files, directories and bytes of the index on disk, as often as that is cheap."""
        while True:
            began = time.monotonic()
            found = await trio.to_thread.run_sync(descriptors.tree_size, self.context.settings.lancedb_directory)
            self.disk = found or self.disk
            await trio.sleep(max(CLASSIFY_SECONDS, (time.monotonic() - began) / WALK_SHARE))

    def _bounds(self) -> tuple[int, int, int]:
        """Return the limit, the soft and the hard budget, in descriptors."""
        limit = descriptors.limits()[0]
        return limit, *ceiling.budgets_of(self.context.settings, limit=limit, others=self.context.base.descriptors)

    @property
    def pinning(self) -> bool:
        """Return whether indexes pin descriptors: in mode `pinned`, and if the self-test of `reopen` failed."""
        mode = self.context.settings.lancedb.descriptor_mode
        return mode == "pinned" or (self.law is not None and not self.law.holds)

    def _learn_slope(self, count: int, *, soft: int) -> None:
        """Learn from one more pair. Lower the cap if what a full Session would pin passes the soft budget."""
        index, pinned = self.context.index, self.classes["lance_index"] + self.classes["deleted"]
        self.learner.see(index.rotations, index.session_bytes(), pinned)
        self.slope = self.learner.slope() or self.slope
        if self.slope is None:
            return
        room = soft - (count - pinned)
        fitting = ceiling.fitting_cap(self.context.settings.lancedb, self.slope, cap_bytes=index.cap_bytes, room=room)
        if fitting < index.cap_bytes:
            logger.warning(
                "cap_lowered before={} after={} slope={} room={}",
                index.cap_bytes,
                fitting,
                self.slope.per_mebibyte,
                room,
            )
            index.cap_bytes = fitting
            self.learner.forget()
            self._rotate(count, reason="slope")

    async def _keep_slope(self) -> None:
        """Keep the learned slope for the cap of the next start, unless it differs too little from the kept one."""
        slope, known = self.slope, self._kept_slope
        if slope is None or (known is not None and abs(slope.high - known.high) <= KEEP_DIFFERENCE * known.high):
            return
        text = slope.as_text()
        await self.context.database.awrite(lambda tx: meta.put(tx, meta.SLOPE, text))
        self._kept_slope = slope

    def _classify(self, now: float, count: int) -> bool:
        """Sort the descriptors into classes if that is due. Returns whether it was."""
        at, counted = self._classified
        if now - at < CLASSIFY_SECONDS and abs(count - counted) < JUMP:
            return False
        settings = self.context.settings
        self._classified = now, count
        self.classes = descriptors.classify(count, lancedb=settings.lancedb_directory, engine=settings.engine_directory)
        return True

    def _rotate_for_descriptors(self, now: float, before: int, *, reason: str) -> None:
        """Rotate, unless the last rotation freed no descriptor and its rest is not over."""
        if now < self._rotate_after:
            return
        self._rotate(before, reason=reason)
        helped = self._before_last - self._lowest_since > 1 or not self._before_last  # its readers may have gone later
        self._rest_seconds = FIRST_REST_SECONDS if helped else min(2 * self._rest_seconds, MAX_REST_SECONDS)
        self._rotate_after = now + self._rest_seconds
        self._before_last = self._lowest_since = before

    def _rotate_for_bytes(self, now: float, before: int) -> None:
        """Rotate because of the Session's bytes or the process's bytes, not sooner than a rest after the last time."""
        index = self.context.index
        if index.session_bytes() > self.context.settings.lancedb.session_most_bytes:
            if now - self._rotated_for_bytes >= BYTES_REST_SECONDS:
                self._rotated_for_bytes = now
                self._rotate(before, reason="session_bytes")
        elif self.resident.wants_rotation(self.memory.rss_bytes, now):
            self._rotate(before, reason="memory")

    def _rotate(self, before: int, *, reason: str) -> None:
        index, held_bytes = self.context.index, self.context.index.session_bytes()
        index.rotate()
        self._trim_due = True
        after = self.count()
        logger.warning(
            "session_rotated reason={} before={} after={} session_bytes={} rotations={} waiting={} classes={}",
            reason,
            before,
            after,
            held_bytes,
            index.rotations,
            index.sessions_open - 1,
            {name: number for name, number in self.classes.items() if number},
        )

    def _press(self, count: int, share: float) -> None:
        value = self.context.pressure.value
        if share == value:
            return
        self.context.pressure.value = share
        self.context.index.narrow(share)
        if (share <= 0) != (value <= 0) or (share >= 1) != (value >= 1):
            logger.warning("pressure share={:.2f} before={:.2f} descriptors={}", share, value, count)
        if value <= 0:
            self.context.wake_up()

    async def _report(self, *, calm: bool, exhausting: bool, limit: int) -> None:
        context = self.context
        if not calm:
            self._was_exhausted = True
            message = f"the process has no file descriptor left of its {limit}: new work waits, nothing is lost"
            await context.conditions.say("descriptors_exhausted", message, EXHAUSTED_REMEDY)
            return
        await context.conditions.over("descriptors_exhausted")
        if self._was_exhausted:
            self._was_exhausted = False
            context.look_again()  # events and full scans of that time are void
        if exhausting:
            hard = context.settings.lancedb.hard_budget_share
            message = f"more than {hard:.0%} of the {limit} file descriptors are open: new work waits"
            await context.conditions.say("descriptors_over_budget", message, OVER_REMEDY)
        else:
            await context.conditions.over("descriptors_over_budget")

    def _publish(self, count: int) -> None:
        context, index, settings = self.context, self.context.index, self.context.settings.lancedb
        limit, soft, hard = self._bounds()
        self.memory = descriptors.memory() or self.memory
        point = Point(now_milliseconds(), count, self.memory.rss_bytes, context.pressure.value, index.session_bytes())
        context.fds_history.append(point)
        context.fds = {
            "count": count,
            "peak": self.peak,
            "limit": limit,
            "soft_budget": soft,
            "hard_budget": hard,
            "ceiling": ceiling.ceiling_of(
                context.settings, cap_bytes=index.cap_bytes, pinned=self.pinning, limit=limit
            ),
            "counted_by": self.counted_by,
            "classes": self.classes,
            "mode": settings.descriptor_mode,
            "law": None if self.law is None else asdict(self.law),
            "cap_bytes": index.cap_bytes,
            "slope": None if self.slope is None else asdict(self.slope),
            "session_bytes": point.session_bytes,
            "rotations": index.rotations,
            "generations_open": index.sessions_open,
            "exhaustions": context.exhaustion.value,
            "rss_bytes": point.rss_bytes,
            "memory": self.resident.as_data(point.rss_bytes),
            "threads": self.memory.threads,
            "index_files": self.disk[0],
            "index_directories": self.disk[1],
            "index_bytes": self.disk[2],
            "sampled_milliseconds": point.at_milliseconds,
        }
        if self._history is not None:
            line = point._asdict() | {"limit": limit, "soft_budget": soft, "rotations": index.rotations}
            self._history_failed_for = self._history.append(json.dumps(line))


def share_of_descriptors(count: int, *, soft: int, hard: int) -> float:
    """Return the worker's share: 1 up to the soft budget, falling evenly to 0 at the hard one."""
    if count <= soft:
        return 1.0
    return max(0.0, (hard - count) / max(1, hard - soft))


def _kept(text: str | None) -> SelfTest | None:
    try:
        return SelfTest(**json.loads(text)) if text else None
    except (ValueError, TypeError):
        return None
