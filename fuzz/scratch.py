"""Where throw-away files go: into memory where the system has a place there, so that no run waits for a disk's syncs."""

from __future__ import annotations

import os

SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""For ``dir=`` of ``tempfile``; None is its own default."""
