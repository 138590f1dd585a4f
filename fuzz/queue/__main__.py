"""Run the suite with pytest: `python -m fuzz.queue [option of pytest...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if __name__ == "__main__":
    files = [HERE / "machine.py"]
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *map(str, files), *sys.argv[1:]]))
