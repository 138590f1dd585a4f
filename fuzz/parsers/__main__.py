"""Run the suite with pytest: `python -m fuzz.parsers [option of pytest...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if __name__ == "__main__":
    files = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("_"))
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *map(str, files), *sys.argv[1:]]))
