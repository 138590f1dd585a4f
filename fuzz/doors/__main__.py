"""Run the suite: `python -m fuzz.doors --help`."""

from __future__ import annotations

import sys

from loguru import logger

from fuzz.doors.driver import main

if __name__ == "__main__":
    logger.remove()
    sys.exit(main())
