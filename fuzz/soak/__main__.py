"""Run the suite: `python -m fuzz.soak --help`."""

from __future__ import annotations

import sys

from fuzz.soak.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
