"""Run the suite: `python -m fuzz.claimers --help`."""

from __future__ import annotations

import sys

from fuzz.claimers.driver import main

if __name__ == "__main__":
    sys.exit(main())
