"""Kills a real engine at random moments, again and again: at the end the index is the tree and little was embedded twice.

    python -m fuzz.crash --files 1000 --kills 10 [--edits 300] [--seed N]

First `kill -9` during a first index, then under edits. A loopback embedding service here counts every text it is sent.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lancedb

from embedding_server import Handler, Service, serving
from everos_engine.embed.protocol import PROBE_SENTENCE
from everos_engine.system.control import ask
from fuzz.tree.machine import Writer, drawn
from fuzz.tree.model import Account, Content, Row, Said

BATCH = 64
PATIENCE_SECONDS = 300
"""What takes longer hangs."""


class Asked:
    """Count the texts that an embedding service is asked for, by session of the engine."""

    def __init__(self, server: Service, delay_seconds: float) -> None:
        self.url = server.url
        self.delay_seconds = delay_seconds
        self.session = 0
        self.texts: dict[str, int] = {}
        """Text -> the session that asked for it last."""
        self.lost: Counter[int] = Counter()
        """Session -> texts it had asked for and a later one had to ask for again."""
        self.moved = threading.Condition()
        server.misbehave = self._count

    def _count(self, _: Handler, body: dict[str, Any]) -> bool:
        """Count a call and wait. The service then answers as usual."""
        with self.moved:
            for text in body["input"]:
                if text != PROBE_SENTENCE:
                    if text in self.texts:
                        self.lost[self.texts[text]] += 1
                    self.texts[text] = self.session
            self.moved.notify_all()
        time.sleep(self.delay_seconds)
        return False

    def wait_for(self, texts: int) -> bool:
        """Wait until so many different texts were asked for. Return False if that takes too long."""
        with self.moved:
            return self.moved.wait_for(lambda: len(self.texts) >= texts, PATIENCE_SECONDS)


class Driver:
    def __init__(self, directory: Path, chance: random.Random, asked: Asked, concurrency: int) -> None:
        self.root, self.log = directory / "root", directory / "engine.log"
        self.root.mkdir()
        self.chance, self.asked = chance, asked
        self.account, self.writer = Account(), Writer(self.root)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVEROS_")},
            "XDG_CONFIG_HOME": str(directory / "config"),
            "EVEROS_ROOT": str(self.root),
            "EVEROS_NOTE__GLOBS": os.pathsep.join(["notes/**/*.md", "notes/*.md"]),
            "EVEROS_EMBEDDER__KIND": "http",
            "EVEROS_EMBEDDER__URL": asked.url,
            "EVEROS_EMBEDDER__MODEL": "fuzz",
            "EVEROS_EMBEDDER__BATCH_SIZE": str(BATCH),
            "EVEROS_EMBEDDER__CONCURRENCY": str(concurrency),
            "EVEROS_EMBEDDER__HEDGE_SECONDS": str(
                PATIENCE_SECONDS
            ),  # a busy machine makes no call slow: none is repeated
            "EVEROS_EMBEDDER__DEADLINE_SECONDS": str(PATIENCE_SECONDS),
            "EVEROS_SHUTDOWN_GRACE_SECONDS": str(PATIENCE_SECONDS),
            "EVEROS_BRAKE_RATIO": "1",
            "EVEROS_SCAN_INTERVAL_SECONDS": "5",
        }

    def write_tree(self, files: int) -> None:
        for number in range(files):
            said = tuple(
                Said(f"e_{number:06d}_{at}", (f"m{number}n fact {at} of file {number}",), number) for at in range(2)
            )
            content = Content("atomic_fact", said)
            key = f"users/u{number % 17}/.atomic_facts/{number}.md"
            self.writer.tree.nodes[key] = content
            self.writer.path(key).write_bytes(content.data)
        self.account.saw(self.writer.tree.states())

    @contextmanager
    def engine(self, *, may_end: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """Run an engine, a session of its own, and kill it at the end of the block if it still runs."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "everos_engine", "run", "--log-format", "json"]
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        try:
            yield process
            if process.poll() is not None and not may_end:
                message = f"the engine ended by itself with {process.returncode}: {self.log.read_text()[-3000:]}"
                raise AssertionError(message)
        finally:
            process.kill()
            process.wait()
            with self.asked.moved:
                self.asked.session += 1

    def first_index(self, files: int, kills: int) -> None:
        texts = 2 * files
        for nth in range(kills):
            with self.engine():
                seen = len(self.asked.texts)
                if seen == texts:
                    time.sleep(self.chance.random() * 4)
                elif not self.asked.wait_for(seen + self.chance.randint(1, max(1, (texts - seen) // (kills - nth)))):
                    message = f"nothing was embedded within {PATIENCE_SECONDS} s: {self.log.read_text()[-3000:]}"
                    raise AssertionError(message)
                time.sleep(self.chance.random() * self.asked.delay_seconds)
            print(f"  kill {nth + 1}: {len(self.asked.texts)} of {texts} texts embedded", flush=True)

    def under_edits(self, edits: int, kills: int) -> None:
        operations = [op for op in drawn(self.chance.randrange(10**6), edits) if op[0] != "rename_directory"]
        for nth in range(kills):
            share = operations[nth * len(operations) // kills : (nth + 1) * len(operations) // kills]
            with self.engine():
                for operation in share:
                    self.writer.apply(operation)
                    self.account.saw(self.writer.tree.states())
                    time.sleep(self.chance.random() * 0.15)
                time.sleep(self.chance.random())

    def verdict(self) -> list[str]:
        """Run a last session: it gets in step, and a signal stops it. Return what is wrong then."""
        wrong = []
        with self.engine(may_end=True) as process:
            socket = self.root / ".index" / "engine" / "control.sock"
            while process.poll() is None and ask(socket, "pulse", deadline_seconds=PATIENCE_SECONDS) is None:
                time.sleep(0.02)  # else `sync` would be the engine
            command = [sys.executable, "-m", "everos_engine", "sync"]
            done = subprocess.run(
                command, env=self.environment, capture_output=True, check=False, timeout=PATIENCE_SECONDS
            )
            if done.returncode not in {0, 1}:
                wrong.append(f"sync ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
            process.send_signal(signal.SIGTERM)
            if process.wait(2 * PATIENCE_SECONDS) != 0:
                wrong.append(f"a stopped engine ended with {process.returncode}")
        standing = self.standing()
        stuck = [key for key, status in standing.items() if status in {"processing", "pending"}]
        wrong += [f"{key!r} is still {standing[key]}" for key in stuck]
        return wrong + self.account.check(self.index(), standing)

    def standing(self) -> dict[str, str]:
        with sqlite3.connect(self.root / ".index" / "engine" / "engine.db") as database:
            return dict(database.execute("SELECT md_path, status FROM md_change_state"))

    def index(self) -> dict[str, dict[str, Row]]:
        found: dict[str, dict[str, Row]] = {}
        for path in sorted((self.root / ".index" / "lancedb").glob("*.lance")):
            for row in lancedb.connect(str(path.parent)).open_table(path.stem).to_arrow().to_pylist():
                key, name = str(row.pop("md_path")), str(row.pop("entry_id"))
                if name in found.setdefault(key, {}):
                    message = f"{key!r} {name!r} is there twice"
                    raise AssertionError(message)
                found[key][name] = tuple(sorted((k, v) for k, v in row.items() if k not in {"vector", "content_hash"}))
        return found


def main() -> int:
    """Run it; exit status 1 where the index is not the tree."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.crash", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--concurrency", type=int, default=1, help="embedding calls in flight")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    print(f"crash_driver: seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="everos-crash-") as name, serving() as server:
        asked = Asked(server, delay_seconds=0.1)
        driver = Driver(Path(name), chance, asked, arguments.concurrency)
        driver.write_tree(arguments.files)
        driver.first_index(arguments.files, arguments.kills)
        wrong = driver.verdict()
        again = [asked.lost[session] for session in range(asked.session)]
        print(f"crash_driver: first index of {len(asked.texts)} texts. Embedded again, by session: {again}")
        if arguments.edits and not wrong:
            driver.under_edits(arguments.edits, arguments.kills)
            wrong = driver.verdict()
            print(f"crash_driver: {arguments.edits} edits under {arguments.kills} kills")
    most = arguments.concurrency * BATCH
    if max(again) > most:
        wrong.append(f"{max(again)} texts of one session were embedded again, {most} can be in flight")
    for line in wrong[:20]:
        print(f"crash_driver: {line}", file=sys.stderr)
    print("crash_driver: WRONG" if wrong else "crash_driver: in step")
    return 1 if wrong else 0
