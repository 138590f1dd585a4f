"""The descriptor stress: bounded by default, or for as long as asked.

    python -m fuzz.stress [--minutes N]

Both forms run the state machine of ``fuzz/descriptors`` and the soaks of ``fuzz/soak``; plots and JSON lines go to results/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fuzz.descriptors import machine
from fuzz.soak import driver

BOUNDED_MINUTES, BOUNDED_PLAN = 0.5, ((64, "reopen"), (1024, "reopen"), (256, "pinned"))
MACHINE_SHARE = 0.2
"""The state machine's minutes for each minute of a soak."""


def main(arguments: Sequence[str]) -> int:
    """Everything in turn; exit status 1 where anything fails."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.stress", description="The descriptor stress.")
    parser.add_argument(
        "--minutes", type=float, help="how long each soak lasts; by default half a minute, of fewer limits"
    )
    asked = parser.parse_args(arguments).minutes
    minutes, plan = (BOUNDED_MINUTES, BOUNDED_PLAN) if asked is None else (asked, driver.PLAN)
    machine.main(["--minutes", str(MACHINE_SHARE * minutes)])
    return driver.run_plan(plan, minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
