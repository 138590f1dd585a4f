"""Run the suite: `python -m fuzz.descriptors --help`."""

from __future__ import annotations

import sys

from fuzz.descriptors.machine import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
