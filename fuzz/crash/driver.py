"""Kills a real engine at random moments, again and again: at the end the index is the tree and little was embedded twice.

    python -m fuzz.crash --files 1000 --kills 10 [--edits 300] [--seed N]

First `kill -9` during a first index, then under edits. A loopback embedding service here counts every text it is sent.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
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
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lancedb
import numpy as np

from everos_engine.embed.protocol import PROBE_SENTENCE
from everos_engine.system.control import ask
from fuzz.tree.machine import Writer, drawn
from fuzz.tree.model import Account, Content, Row, Said

DIMENSION = 16
BATCH = 64
PATIENCE_SECONDS = 300
"""What takes longer hangs."""


class Service:
    """An OpenAI-compatible embedding service on loopback that remembers what it was asked, by engine life."""

    def __init__(self, delay_seconds: float) -> None:
        self.delay_seconds = delay_seconds
        self.epoch = 0
        self.asked: dict[str, int] = {}
        """Text -> the engine's life that asked for it last."""
        self.lost: Counter[int] = Counter()
        """Life -> texts it had asked for and another had to ask for again."""
        self.moved = threading.Condition()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
                service.note(texts)
                time.sleep(service.delay_seconds)
                data = [{"index": at, "embedding": encoded(text)} for at, text in enumerate(texts)]
                body = json.dumps({"data": data}).encode()
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except ConnectionError:
                    self.close_connection = True  # the engine was killed

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def note(self, texts: list[str]) -> None:
        """A call came."""
        with self.moved:
            for text in texts:
                if text != PROBE_SENTENCE:
                    if text in self.asked:
                        self.lost[self.asked[text]] += 1
                    self.asked[text] = self.epoch
            self.moved.notify_all()

    def wait_for(self, texts: int) -> bool:
        """Wait until so many different texts were asked for; False when that takes too long."""
        with self.moved:
            return self.moved.wait_for(lambda: len(self.asked) >= texts, PATIENCE_SECONDS)


def encoded(text: str) -> str:
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return base64.b64encode(np.random.default_rng(seed).standard_normal(DIMENSION).astype("<f4").tobytes()).decode()


class Driver:
    def __init__(self, directory: Path, chance: random.Random, service: Service, concurrency: int) -> None:
        self.root, self.log = directory / "root", directory / "engine.log"
        self.root.mkdir()
        self.chance, self.service = chance, service
        self.account, self.writer = Account(), Writer(self.root)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVEROS_")},
            "XDG_CONFIG_HOME": str(directory / "config"),
            "EVEROS_ROOT": str(self.root),
            "EVEROS_NOTE__GLOBS": os.pathsep.join(["notes/**/*.md", "notes/*.md"]),
            "EVEROS_EMBEDDER__KIND": "http",
            "EVEROS_EMBEDDER__URL": service.url,
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
        """An engine of its own life; killed at the end of the block if it still runs."""
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
            with self.service.moved:
                self.service.epoch += 1

    def first_index(self, files: int, kills: int) -> None:
        texts = 2 * files
        for nth in range(kills):
            with self.engine():
                seen = len(self.service.asked)
                if seen == texts:
                    time.sleep(self.chance.random() * 4)
                elif not self.service.wait_for(seen + self.chance.randint(1, max(1, (texts - seen) // (kills - nth)))):
                    message = f"nothing was embedded within {PATIENCE_SECONDS} s: {self.log.read_text()[-3000:]}"
                    raise AssertionError(message)
                time.sleep(self.chance.random() * self.service.delay_seconds)
            print(f"  kill {nth + 1}: {len(self.service.asked)} of {texts} texts embedded", flush=True)

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
        """A last life: in step, stopped by a signal; what is wrong then."""
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
    chance, service = random.Random(arguments.seed), Service(delay_seconds=0.1)
    print(f"crash_driver: seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="everos-crash-") as name:
        driver = Driver(Path(name), chance, service, arguments.concurrency)
        driver.write_tree(arguments.files)
        driver.first_index(arguments.files, arguments.kills)
        wrong = driver.verdict()
        again = [service.lost[epoch] for epoch in range(service.epoch)]
        print(f"crash_driver: first index of {len(service.asked)} texts; of each life embedded again: {again}")
        if arguments.edits and not wrong:
            driver.under_edits(arguments.edits, arguments.kills)
            wrong = driver.verdict()
            print(f"crash_driver: {arguments.edits} edits under {arguments.kills} kills")
    most = arguments.concurrency * BATCH
    if max(again) > most:
        wrong.append(f"{max(again)} texts of one life were embedded again, {most} can be in flight")
    for line in wrong[:20]:
        print(f"crash_driver: {line}", file=sys.stderr)
    print("crash_driver: WRONG" if wrong else "crash_driver: in step")
    return 1 if wrong else 0
