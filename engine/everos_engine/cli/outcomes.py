"""What commands print about a file, and the exit statuses."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from everos_engine.diagnose.wording import ago, printable, program_at, shown
from everos_engine.settings import Settings

if TYPE_CHECKING:
    from everos_engine.stores.reports import Outcome

OK, TROUBLE, USAGE, INTERRUPTED = 0, 1, 2, 130


def show_outcome(outcome: Outcome) -> None:
    """Print the state of one file, and its error."""
    word: str = outcome.status or "no such file; no rows of it are left"
    if outcome.status == "failed":
        seconds = max(0.0, time.time() - outcome.updated / 1000)
        word = f"failed retryable={str(outcome.retryable).upper()} retries={outcome.retry_count}, last attempt {ago(seconds)} ago"
    if outcome.held is not None:
        from everos_engine.stores.held import REMEDY, WHY

        word = f"the file is gone, and its deletion is held because {WHY[outcome.held]}; {REMEDY[outcome.held]}"
    print(f"{shown(outcome.md_path)}: {word}")
    for line in (outcome.error or "").split("\n") if outcome.error and outcome.status in {"failed", "pending"} else []:
        print(f"    {printable(line)}")


def program(settings: Settings, arguments: argparse.Namespace) -> str:
    """Return how to call this program again on the same root."""
    return program_at(settings.root if arguments.root is not None else None)
