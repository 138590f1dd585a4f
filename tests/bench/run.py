"""Runs the benchmarks, each in a process of its own, and prints a table.

python tests/bench/run.py [name...] [--update-docs]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict

import costs
import latency
import session
from harness import BOOK, REPOSITORY, Figure, keep, page, table

MODULES = (latency, costs, session)
MARK = "figures: "


def main() -> int:
    """Run those named, or all; 1 if one fails to run. A missed target is told, not an error: machines differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(BOOK.benches)}")
    parser.add_argument("--update-docs", action="store_true", help="write docs/benchmarks.md; needs all of them")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.name if name not in BOOK.benches]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}: choose of {', '.join(BOOK.benches)}")
    if arguments.one:
        print(MARK + json.dumps([asdict(figure) for figure in BOOK.benches[arguments.name[0]]()]))
        return 0
    if arguments.update_docs and arguments.name:
        parser.error("--update-docs needs all benchmarks: name none")
    figures: list[Figure] = []
    failed = []
    for name in arguments.name or BOOK.benches:
        found = _apart(name)
        figures += found
        if not found:
            failed.append(name)
    print(table(figures))
    print(f"kept in {keep(figures).relative_to(REPOSITORY)}")
    if failed:
        print(f"failed to run: {', '.join(failed)}", file=sys.stderr)
    elif arguments.update_docs:
        (REPOSITORY / "docs" / "benchmarks.md").write_text(page(figures))
    return 1 if failed else 0


def _apart(name: str) -> list[Figure]:
    began = time.monotonic()
    command = [sys.executable, __file__, name, "--one"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"bench: {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return [Figure(**figure) for figure in json.loads(line.removeprefix(MARK))]
    print(done.stderr[-4000:], file=sys.stderr)
    return []


if __name__ == "__main__":
    sys.exit(main())
