"""Whether an engine serves a root, and its state: its lock, its process, its answer on the control socket."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from everos_engine.settings import Settings
from everos_engine.system.control import ask
from everos_engine.system.locks import running_pid

State = Literal["absent", "answers", "mute", "silent", "stopped", "hidden"]
PULSE_DEADLINE_SECONDS = 1.0
TRIES, PAUSE_SECONDS = 4, 0.05


@dataclass(frozen=True, slots=True)
class Stall:
    """A loop that has not moved within its allowance."""

    loop: str
    seconds: float
    allowance_seconds: float


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of the engine, with the remedy."""

    code: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class EngineState:
    """The state of a root's engine. ``pid`` is None if no engine serves the root, and 0 if its pid cannot be read.

    ``state`` is one of: absent, answers, mute (it holds the lock but does not listen), silent (it does not answer
    within a second), stopped (the same, and its process is stopped), hidden (the lock may not be read).
    """

    pid: int | None
    state: State
    snapshot: Mapping[str, object] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Return whether an engine holds the root, well or not."""
        return self.pid is not None

    @property
    def stalls(self) -> list[Stall]:
        """Return the loops that have not moved within their allowance."""
        found = []
        for name, facts in _mapping(self.snapshot.get("loops")).items():
            loop = _mapping(facts)
            if loop.get("stalled"):
                found.append(Stall(name, number(loop.get("beat_seconds_ago")), number(loop.get("allowance_seconds"))))
        return found

    @property
    def conditions(self) -> list[Condition]:
        """Return the engine's conditions."""
        listed = self.watch.get("conditions")
        conditions = [_mapping(note) for note in listed] if isinstance(listed, list) else []
        return [Condition(*(str(note.get(name, "")) for name in ("code", "message", "remedy"))) for note in conditions]

    @property
    def watch(self) -> Mapping[str, object]:
        """Return the snapshot's part about watching."""
        return _mapping(self.snapshot.get("watch"))

    @property
    def hung(self) -> list[str]:
        """Return the files and directories that do not answer the engine."""
        listed = self.snapshot.get("hung")
        return [str(one[0]) for one in listed if isinstance(one, list) and one] if isinstance(listed, list) else []

    @property
    def descriptors(self) -> Mapping[str, object]:
        """Return the snapshot's part about file descriptors."""
        return _mapping(self.snapshot.get("fds"))

    @property
    def memory(self) -> Mapping[str, object]:
        """Return the snapshot's part about resident memory: bytes, their ceiling and its parts.

        Empty before the first count.
        """
        return _mapping(self.descriptors.get("memory"))


def read_engine_state(settings: Settings) -> EngineState:
    """Return the state of this root's engine now."""
    try:
        pid = running_pid(settings.engine_lock)
    except PermissionError:
        return EngineState(0, "hidden")
    if pid is None:
        return EngineState(None, "absent")
    for _ in range(TRIES):
        try:
            snapshot = ask(settings.control_socket, "pulse", deadline_seconds=PULSE_DEADLINE_SECONDS)
        except TimeoutError:
            return EngineState(pid, "stopped" if _is_stopped(pid) else "silent")
        except (OSError, ValueError):
            snapshot = None
        if snapshot is not None:
            return EngineState(pid, "answers", snapshot)
        time.sleep(PAUSE_SECONDS)  # it may have taken the lock a moment ago, and listen in a moment
    return EngineState(pid, "stopped" if _is_stopped(pid) else "mute")


def _is_stopped(pid: int) -> bool:
    return process_state(pid) in {"T", "t"}


def process_state(pid: int) -> str:
    """Return the kernel's letter for a process (R, S, D, T, Z, ...), or "" if it is unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]


def number(value: object) -> float:
    """Return a number out of JSON, 0 for anything else."""
    return float(value) if isinstance(value, (int, float)) else 0.0


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
