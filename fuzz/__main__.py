"""Run the fuzz suites: bounded and repeatable by default, or with fresh seeds until the time is over.

python -m fuzz [--minutes N] [suite...]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from fuzz import REPOSITORY

Options = Sequence[object]


def _hypothesis(seed: int) -> Options:
    return "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"


SUITES: dict[str, tuple[Options, Callable[[int], Options]]] = {
    "queue": (["--hypothesis-profile=ci"], _hypothesis),
    "parsers": (["--hypothesis-profile=ci"], _hypothesis),
    "tree": (
        ["--operations", 200, "--seed", 1],
        lambda seed: ["--operations", 1000, "--seed", seed],
    ),
    "faults": (["--most", 2], lambda _: []),
    "damage": (["--cases", 24], lambda seed: ["--seed", seed]),
    "doors": (["--most", 6, "--seconds", 2], lambda _: ["--seconds", 60]),
    "claimers": (["--seconds", 4], lambda _: ["--seconds", 30]),
    "crash": (
        ["--files", 200, "--kills", 2, "--edits", 30, "--seed", 1],
        lambda seed: ["--files", 1000, "--kills", 10, "--edits", 300, "--seed", seed],
    ),
}
"""The options of each suite: bounded and repeatable, and long with a seed."""


def main() -> int:
    """Run the suites chosen, all by default. Return 1 as soon as one fails."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, help="repeat with fresh seeds until this time is over")
    parser.add_argument("suite", nargs="*", help=f"of {', '.join(SUITES)}")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.suite if name not in SUITES]
    if unknown:
        parser.error(f"there is no suite {unknown[0]!r}: choose of {', '.join(SUITES)}")
    until = time.monotonic() + 60 * (arguments.minutes or 0)
    while True:
        for name in arguments.suite or SUITES:
            bounded, long = SUITES[name]
            options = long(random.SystemRandom().randrange(10**6)) if arguments.minutes else bounded
            command = [sys.executable, "-m", f"fuzz.{name}", *map(str, options)]
            started = time.monotonic()
            print(f"fuzz: {name}: python {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, check=False, cwd=REPOSITORY).returncode:
                print(f"fuzz: {name} failed; see docs/testing.md for how to reproduce it")
                return 1
            print(f"fuzz: {name} passed in {time.monotonic() - started:.0f} s", flush=True)
            if arguments.minutes and time.monotonic() > until:
                return 0
        if not arguments.minutes:
            return 0


if __name__ == "__main__":
    sys.exit(main())
