"""``python -m everos_engine``."""

from __future__ import annotations

import sys

from everos_engine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
