"""Damages every file below .index, and checks that the engine brings the index back in step with the tree by itself.

    python -m fuzz.damage [--cases N] [--seed N] [--only WORD] [--at STATE/WAY/PATH]

Each file in turn is zeroed, cut in half, flipped in its middle, emptied or removed, before the engine starts or while it runs.
Without --cases all are tried. A flip that no read notices is listed, and is not a failure.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio
from loguru import logger

from everos_engine.engine import Engine, open_engine
from everos_engine.errors import Transient
from everos_engine.settings import Settings, load
from everos_engine.testing import FakeEmbedder
from fuzz import REPOSITORY
from fuzz.scratch import SCRATCH
from fuzz.tree.machine import Mismatch

if TYPE_CHECKING:
    from loguru import Message

STATES = ("stopped", "running")
SETTLE_SECONDS = 120
TRIES = 8
EDITED = "notes/1.md"
Rows = Mapping[tuple[str, str, str], tuple[tuple[str, object], ...]]
"""(kind, md_path, entry_id) -> every column of the row."""


def _zero(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        (byte,) = file.read(1) or b"\0"
        file.seek(size // 2)
        file.write(bytes([byte ^ 0xFF]))


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _remove(path: Path) -> None:
    path.unlink()


WAYS: Mapping[str, Callable[[Path], None]] = {
    "zeroed": _zero,
    "cut": _cut,
    "flipped": _flip,
    "emptied": _empty,
    "removed": _remove,
}


class Facts(NamedTuple):
    """What is damaged, how, and when; ``path`` is relative to .index."""

    state: str
    way: str
    path: str

    def __str__(self) -> str:
        return "/".join(self)

    @property
    def needs_a_process(self) -> bool:
        """Whether the damage may end the process: SQLite maps its shared memory, and a cut map is a SIGBUS."""
        return self.state == "running" and self.path.startswith("engine/")


class Outcome(NamedTuple):
    """Whether the rows are as they should be, and whether anything was reported at all."""

    same_rows: bool
    noticed: bool


def settings_of(root: Path) -> Settings:
    flags = {
        "memory.root": str(root),
        "note.globs": ["notes/*.md"],
        "watch.mode": "off",
        "scan_interval_seconds": 3600,
        "settle_milliseconds": 20,
        "worker_retry_backoff_seconds": 0.01,
    }
    return load(flags, environment={}, user_file=root / "none")


async def build(root: Path) -> Rows:
    """Fill a root, index it in several commits and a compaction. Returns the rows of the tree after the edit of a case."""
    for number in range(4):
        _put(root, f"notes/{number}.md", f"# Heading {number}\nheron number {number} at the river\n")
    _put(
        root, "users/u1/user.md", "---\ntype: user_profile\nuser_id: u1\nsummary: an otter\n---\n\nMore of the otter.\n"
    )
    async with open_engine(settings_of(root), embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
        await engine.context.index.optimize("note")
        for number in (0, 2):
            _put(root, f"notes/{number}.md", f"# Heading {number}\nheron number {number} at the lake\n")
            await engine.settle()
    with tempfile.TemporaryDirectory(prefix="everos-damage-", dir=SCRATCH) as name:
        fresh = Path(os.path.realpath(name)) / "root"
        shutil.copytree(root, fresh, ignore=shutil.ignore_patterns(".index"))
        _edit(fresh)
        async with open_engine(settings_of(fresh), embedder=FakeEmbedder(), watching=False) as engine:
            await engine.settle()
            return await rows_of(engine)


def cases(template: Path) -> list[Facts]:
    """Every case, for the files that are there at rest, and those of a running engine."""
    at_rest = sorted(str(path.relative_to(template / ".index")) for path in _files(template / ".index"))
    open_too = [f"engine/{name}.db-{part}" for name in ("engine", "embeddings") for part in ("wal", "shm")]
    own = ["engine/owners/*"]
    paths = {"stopped": at_rest, "running": [*at_rest, *(name for name in open_too if name not in at_rest), *own]}
    return [Facts(state, way, path) for state in STATES for path in paths[state] for way in WAYS]


async def once(template: Path, expected: Rows, case: Facts) -> Outcome:
    """One damage, and what came of it. Raises Mismatch if the engine does not get in step, or shows a traceback."""
    with tempfile.TemporaryDirectory(prefix="everos-damage-", dir=SCRATCH) as name:
        root = Path(os.path.realpath(name)) / "root"
        shutil.copytree(template, root, symlinks=True, copy_function=shutil.copy2)
        if case.state == "stopped":
            _damage(root, case)
            return await _served(root, expected, lambda: None)
        return await _served(root, expected, lambda: _damage(root, case))


async def _served(root: Path, expected: Rows, meanwhile: Callable[[], None]) -> Outcome:
    with _recorded() as messages, trio.fail_after(SETTLE_SECONDS):
        async with open_engine(settings_of(root), embedder=FakeEmbedder(), watching=False) as engine:
            await _settled(engine)
            meanwhile()
            await _searched(engine)
            _edit(root)
            await _settled(engine)
            await _searched(engine)
            await _settled(engine)
            counts = (await engine.status()).counts
            found = await rows_of(engine)
    if counts.pending or counts.processing or counts.failed_permanent or counts.failed_retryable:
        message = f"not in step: {counts}"
        raise Mismatch(message)
    loud = [message for message in messages if message.record["exception"] is not None]
    if loud:
        raise Mismatch("\n".join(loud))
    if found.keys() != expected.keys():
        message = f"missing {expected.keys() - found.keys()}, too many {found.keys() - expected.keys()}"
        raise Mismatch(message)
    noticed = any(message.record["level"].no >= logger.level("WARNING").no for message in messages)
    return Outcome(same_rows=found == expected, noticed=noticed)


async def _settled(engine: Engine) -> None:
    for _ in range(TRIES):
        try:
            await engine.settle()
        except Transient as error:
            last = error
            continue
        return
    message = f"refused {TRIES} times: {last!r}"
    raise Mismatch(message)


async def _searched(engine: Engine) -> None:
    """One search may meet the damage, and say so; the next may not."""
    for word in ("heron", "otter"):
        try:
            await engine.search(word)
        except Transient:
            await engine.search(word)


async def rows_of(engine: Engine) -> Rows:
    found: dict[tuple[str, str, str], tuple[tuple[str, object], ...]] = {}
    for kind in engine.context.index.open_kinds():
        for row in await engine.context.index.rows(kind):
            key = (kind, str(row["md_path"]), str(row["entry_id"]))
            if key in found:
                message = f"{key} is there twice"
                raise Mismatch(message)
            found[key] = tuple(sorted((name, str(value)) for name, value in row.items()))
    return found


@contextmanager
def _recorded() -> Iterator[list[Message]]:
    messages: list[Message] = []
    sink = logger.add(messages.append, level="DEBUG")
    try:
        yield messages
    finally:
        logger.remove(sink)


def _damage(root: Path, case: Facts) -> None:
    """Damage what matches; a file that is not there in this state needs no damage."""
    for path in sorted((root / ".index").glob(case.path)):
        if stat.S_ISREG(path.lstat().st_mode):
            WAYS[case.way](path)


def _edit(root: Path) -> None:
    _put(root, EDITED, "# Heading 1\nheron number 1, edited\n")


def _put(root: Path, key: str, text: str) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _files(directory: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(directory):
        for name in names:
            if stat.S_ISREG((Path(folder) / name).lstat().st_mode):
                yield Path(folder) / name


def _chosen(every: Sequence[Facts], count: int, seed: int) -> list[Facts]:
    """``count`` cases, with as many different folders and ways among them as there can be; all if it is 0."""
    if not count:
        return list(every)
    chance = random.Random(seed)
    groups: dict[tuple[str, str, str], list[Facts]] = {}
    for case in every:
        groups.setdefault((case.state, case.way, _role(case.path)), []).append(case)
    first = [chance.choice(group) for group in groups.values()]
    chance.shuffle(first)
    return first[:count]


def _role(path: str) -> str:
    """What a file is for: the part of a table it belongs to, or its own name."""
    parts = path.split("/")
    return parts[2] if parts[0] == "lancedb" and len(parts) > 2 else parts[-1]


def _in_a_process(template: Path, case: Facts) -> str:
    """Run a case in a process of its own. Returns what it printed; a SIGBUS is accepted if a new process gets in step."""
    command = [sys.executable, "-m", "fuzz.damage", "--at", str(case), "--template", str(template)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=2 * SETTLE_SECONDS, cwd=REPOSITORY
    )
    if done.returncode == -signal.SIGBUS and case.path.endswith("-shm"):
        return "ended by SIGBUS\n"
    if done.returncode:
        raise Mismatch(done.stdout + done.stderr)
    return done.stdout


def _say(case: Facts, outcome: Outcome) -> str:
    if outcome.same_rows:
        return ""
    if case.way == "flipped" and not outcome.noticed:
        return "not noticed"
    message = "the rows are not those of the tree"
    raise Mismatch(message)


def main() -> int:
    """Run the cases; exit status 1 if one leaves the index out of step."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.damage", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=0, help="only so many, spread over folders and ways")
    parser.add_argument("--seed", type=int, default=1, help="which of them")
    parser.add_argument("--only", default="", help="only cases with this word, such as stopped, zeroed or lancedb")
    parser.add_argument("--at", help="just this case, as a failure names it")
    parser.add_argument("--template", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="everos-damage-", dir=SCRATCH) as name:
        template = arguments.template or Path(os.path.realpath(name)) / "template"
        template.mkdir(exist_ok=True)
        expected = trio.run(build, template) if not arguments.template else _expected(template)
        if not arguments.template:
            _keep_expected(template, expected)
        if arguments.at:
            chosen = [Facts(*arguments.at.split("/", 2))]
        else:
            every = [case for case in cases(template) if arguments.only in str(case)]
            chosen = _chosen(every, arguments.cases, arguments.seed)
        unnoticed, ended, failed, began = [], [], 0, time.monotonic()
        for case in chosen:
            try:
                if case.needs_a_process and not arguments.template:
                    said = _in_a_process(template, case).strip()
                else:
                    said = _say(case, trio.run(once, template, expected, case))
            except Exception as error:
                print(f"damage: {case}: {error!r}", file=sys.stderr)
                print(f"again: python -m fuzz.damage --at {str(case)!r}", file=sys.stderr, flush=True)
                failed += 1
                continue
            if arguments.template:
                print(said)
            (unnoticed if said == "not noticed" else ended if said else []).append(case)
    if not arguments.template:
        for title, found in (("no read notices", unnoticed), ("ends the process, and a start heals it", ended)):
            for case in found:
                print(f"damage: {title}: {case}")
        good = len(chosen) - failed
        print(
            f"damage: {good} of {len(chosen)} cases in {time.monotonic() - began:.0f} s: the index is the tree",
            flush=True,
        )
    return 1 if failed else 0


def _keep_expected(template: Path, expected: Rows) -> None:
    (template / "expected.txt").write_text(repr(dict(expected)), encoding="utf-8")


def _expected(template: Path) -> Rows:
    import ast

    found: Rows = ast.literal_eval((template / "expected.txt").read_text(encoding="utf-8"))
    return found
