"""Runs the suites: bounded and repeatable by default, or with fresh seeds until the time is over.

python fuzz/run.py [--minutes N] [suite...]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = sorted(str(path) for path in (HERE / "targets").glob("*.py"))


def _pytest(profile: str, seed: int, *files: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-profile={profile}"]
    return [*command, *([f"--hypothesis-seed={seed}"] if profile == "fuzz" else []), *files]


def _script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE / name), *map(str, arguments)]


SUITES: dict[str, tuple[Callable[[], Sequence[str]], Callable[[int], Sequence[str]]]] = {
    "queue": (
        lambda: _pytest("ci", 0, str(HERE / "queue_machine.py")),
        lambda seed: _pytest("fuzz", seed, str(HERE / "queue_machine.py")),
    ),
    "targets": (lambda: _pytest("ci", 0, *TARGETS), lambda seed: _pytest("fuzz", seed, *TARGETS)),
    "tree": (
        lambda: _script("tree_machine.py", "--operations", 200, "--seed", 1),
        lambda seed: _script("tree_machine.py", "--operations", 1000, "--seed", seed),
    ),
    "faults": (lambda: _script("faults.py", "--most", 2), lambda _: _script("faults.py")),
    "damage": (
        lambda: _script("damage.py", "--cases", 24),
        lambda seed: _script("damage.py", "--seed", seed),
    ),
    "doors": (
        lambda: _script("doors.py", "--most", 6, "--seconds", 2),
        lambda _: _script("doors.py", "--seconds", 60),
    ),
    "claimers": (
        lambda: _script("two_claimers.py", "--seconds", 4),
        lambda _: _script("two_claimers.py", "--seconds", 30),
    ),
    "crash": (
        lambda: _script("crash_driver.py", "--files", 200, "--kills", 2, "--edits", 30, "--seed", 1),
        lambda seed: _script("crash_driver.py", "--files", 1000, "--kills", 10, "--edits", 300, "--seed", seed),
    ),
}
"""Each suite's command: bounded and repeatable, and long with a seed."""


def main() -> int:
    """Run the suites chosen, all by default; 1 as soon as one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, help="repeat with fresh seeds until this is over")
    parser.add_argument("suite", nargs="*", help=f"of {', '.join(SUITES)}")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.suite if name not in SUITES]
    if unknown:
        parser.error(f"there is no suite {unknown[0]!r}: choose of {', '.join(SUITES)}")
    chosen = arguments.suite or list(SUITES)
    until = time.monotonic() + 60 * (arguments.minutes or 0)
    while True:
        for name in chosen:
            bounded, long = SUITES[name]
            command = long(random.SystemRandom().randrange(10**6)) if arguments.minutes else bounded()
            started = time.monotonic()
            print(f"fuzz: {name}: {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, check=False).returncode:
                print(f"fuzz: {name} failed; see docs/testing.md for how to reproduce it")
                return 1
            print(f"fuzz: {name} passed in {time.monotonic() - started:.0f} s", flush=True)
            if arguments.minutes and time.monotonic() > until:
                return 0
        if not arguments.minutes:
            return 0


if __name__ == "__main__":
    sys.exit(main())
