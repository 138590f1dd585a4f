"""Run the suite: `python -m fuzz.crash --help`."""

from __future__ import annotations

import sys

from fuzz.crash.driver import main

if __name__ == "__main__":
    sys.exit(main())
