"""Does what the tutorial says, in a folder of its own, and compares what is printed with what the page shows.

python docs/rehearse.py

Numbers, paths and process ids are masked; of `doctor` only the names of the checks are compared, for machines differ.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent / "tutorial.md"
LEFT_OUT = ("python3 -m venv", "~/everos-engine/bin/pip", "export PATH")
"""The installation: the engine that is installed here is rehearsed."""
RUN = "everos-engine --root notes run"
DEADLINE_SECONDS = 120


def main() -> int:
    """Play the page; 1 at the first command that prints something else."""
    with tempfile.TemporaryDirectory() as home:
        rehearsal = Rehearsal(Path(home))
        try:
            return next(
                (
                    1
                    for command, shown in steps(PAGE.read_text(encoding="utf-8"))
                    if not rehearsal.plays(command, shown)
                ),
                0,
            )
        finally:
            rehearsal.stop()


def steps(page: str) -> Iterator[tuple[str, list[str]]]:
    """(command, lines shown below it) of every console block."""
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *shown = step.splitlines()
            if not command.startswith(LEFT_OUT):
                yield command, shown


class Rehearsal:
    """A home folder, and the engine that runs in it once the page has started it."""

    def __init__(self, home: Path) -> None:
        self.home = Path(os.path.realpath(home))
        known = {name: value for name, value in os.environ.items() if not name.startswith(("EVEROS_", "XDG_"))}
        self.environment = known | {"HOME": str(self.home)}
        self.engine: subprocess.Popen[str] | None = None

    def plays(self, command: str, shown: list[str]) -> bool:
        """Whether a command does what the page shows; says so where it does not."""
        if command == RUN:
            self.start()
            return True
        said = subprocess.run(  # noqa: S602 - the page is ours, and has pipes and quotes
            command, shell=True, cwd=self.home, env=self.environment, capture_output=True, text=True,
            timeout=DEADLINE_SECONDS, check=False,
        )  # fmt: skip
        if not shown and self.engine is not None:  # a file was written: the reader takes a moment to type on
            self.quietly("everos-engine --root notes sync")
        due, got = self.masked(command, shown), self.masked(command, said.stdout.splitlines())
        print(f"{'as shown' if due == got else 'differs '}  {command}")
        if due != got:
            sys.stdout.writelines(
                f"{line}\n" for line in difflib.unified_diff(due, got, "shown", "printed", lineterm="")
            )
            print(said.stderr[-2000:])
        return due == got

    def masked(self, command: str, lines: list[str]) -> list[str]:
        """``lines`` without what differs from run to run."""
        if " doctor" in command:
            return [line.split()[1] for line in lines[:-1] if re.match(r"(ok|warn|fail) ", line)]
        text = "\n".join(lines).replace(str(self.home), "/home/ada")
        text = re.sub(r"found by (watch|scan|sync|start),", "found by N,", text)
        return re.sub(r"\d[\d,.]*( s| min)?", "N", text).splitlines()

    def start(self) -> None:
        """Start the engine as the page does, and wait until it says that it runs."""
        self.engine = subprocess.Popen(
            shlex.split(RUN), cwd=self.home, env=self.environment, stderr=subprocess.PIPE, text=True
        )
        assert self.engine.stderr is not None  # noqa: S101 - asked for above
        if not any("engine_started" in line for line in self.engine.stderr):
            message = "the engine did not start"
            raise SystemExit(message)
        self.quietly("everos-engine --root notes sync")

    def quietly(self, command: str) -> None:
        """Run a command for its effect; what is failed on purpose is no failure of the rehearsal."""
        words = shlex.split(command)
        subprocess.run(
            words, cwd=self.home, env=self.environment, capture_output=True, timeout=DEADLINE_SECONDS, check=False
        )

    def stop(self) -> None:
        """Stop the engine, if it runs."""
        if self.engine is not None:
            self.engine.terminate()
            self.engine.wait(timeout=DEADLINE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
