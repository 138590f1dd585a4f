"""The descriptor stress: bounded by default, or for as long as asked.

    python fuzz/stress.py [--minutes N]

Both forms run the state machine of ``descriptors.py`` and the soaks of ``soak.py``; plots and JSON lines go to results/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import descriptors
import soak

BOUNDED_MINUTES, BOUNDED_PLAN = 0.5, ((64, "reopen"), (1024, "reopen"), (256, "pinned"))
MACHINE_SHARE = 0.2
"""The state machine's minutes for each minute of a soak."""


def main(arguments: Sequence[str]) -> int:
    """Everything in turn; exit status 1 where anything fails."""
    parser = argparse.ArgumentParser(description="The descriptor stress.")
    parser.add_argument(
        "--minutes", type=float, help="how long each soak lasts; by default half a minute, of fewer limits"
    )
    asked = parser.parse_args(arguments).minutes
    minutes, plan = (BOUNDED_MINUTES, BOUNDED_PLAN) if asked is None else (asked, soak.PLAN)
    descriptors.main(["--minutes", str(MACHINE_SHARE * minutes)])
    return soak.run_plan(plan, minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
