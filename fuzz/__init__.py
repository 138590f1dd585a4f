"""The fuzz suites, one folder each. `python -m fuzz` runs them, see docs/testing.md.

The helper modules of tests/ are imported by their own names, as the tests import them.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = str(REPOSITORY / "tests")
if TESTS not in sys.path:
    sys.path.append(TESTS)
