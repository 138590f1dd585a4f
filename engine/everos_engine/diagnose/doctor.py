"""``everos-engine doctor``: every check on one screen, each with its cause and a remedy."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from everos_engine.diagnose import checks_index, checks_queue, checks_system
from everos_engine.diagnose.checkup import Check, Facts, gather
from everos_engine.diagnose.wording import Style, shown
from everos_engine.errors import SettingsError, exhausted
from everos_engine.settings import Settings

Checks: TypeAlias = "Sequence[tuple[str, Callable[[Facts], Check | None]]]"
ENOUGH_DESCRIPTORS = 256
EXIT = {"ok": 0, "warn": 1, "fail": 2}
"""The exit status is that of the worst check."""
CHECKS: Checks = (
    ("versions", checks_system.check_versions),
    ("root", checks_system.check_root),
    ("permissions", checks_system.check_index_writable),
    ("private", checks_system.check_private),
    ("mount", checks_system.check_mounts),
    ("disk", checks_system.check_disk),
    ("memory", checks_system.check_memory),
    ("descriptors", checks_system.check_descriptors),
    ("inotify", checks_system.check_inotify),
    ("clock", checks_system.check_clock),
    ("engine", checks_queue.check_engine),
    ("watch", checks_queue.check_watch),
    ("scan", checks_queue.check_scan),
    ("queue", checks_queue.check_queue),
    ("claims", checks_queue.check_claims),
    ("backlog", checks_queue.check_backlog),
    ("files", checks_queue.check_files),
    ("failed", checks_queue.check_failed),
    ("held", checks_queue.check_held),
    ("owners", checks_queue.check_owners),
    ("index", checks_index.check_index),
    ("embedder", checks_index.check_embedder),
)
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
NAME = max(len(name) for name, _ in CHECKS) + 2


def examine(
    settings: Settings, names: Collection[str] = (), *, program: str = "everos-engine", offline: bool = False
) -> list[Check]:
    """Run every check that applies here, or those of ``names``, in order. ``offline`` makes no call to the embedder.

    Raises SettingsError for a name that no check has.
    """
    known = [name for name, _ in CHECKS]
    for name in names:
        if name not in known:
            raise SettingsError(f"there is no check {name!r}: choose from {', '.join(known)}")
    return run(gather(settings, program=program, offline=offline), names)


def run(facts: Facts, names: Collection[str] = (), *, checks: Checks = CHECKS) -> list[Check]:
    """Run the checks on these facts. A check that crashes has failed, and says so. The others go on."""
    found = []
    for name, check in checks:
        if names and name not in names:
            continue
        try:
            result = check(facts)
        except Exception as error:  # noqa: BLE001 - doctor must not die of what it finds
            result = _crashed(facts, name, error)
        if result is not None:
            found.append(result)
    return found


def worst(checks: list[Check]) -> int:
    """Return 0 if all are ok, 1 if one warns, 2 if one fails."""
    return max((EXIT[check.verdict] for check in checks), default=0)


def as_json(settings: Settings, checks: list[Check]) -> dict[str, object]:
    """Return the stable form of ``doctor --json``, documented in docs/doctor.md."""
    status = worst(checks)
    verdict = next(name for name, number in EXIT.items() if number == status)
    return {
        "version": 1,
        "root": str(settings.root),
        "verdict": verdict,
        "checks": [check.as_json() for check in checks],
    }


def as_text(checks: list[Check], style: Style) -> str:
    """Return one line for each check, and more only if something is to be done."""
    lines = []
    for check in checks:
        head = f"{style(check.verdict.ljust(5), COLOURS[check.verdict])} {check.name.ljust(NAME)}"
        lines.append(style.wrap(check.cause, indent=NAME + 6, first=head))
        if check.remedy:
            arrow = style("do", "bold") + "  "
            lines.append(style.wrap(check.remedy, indent=NAME + 10, first=" " * (NAME + 6) + arrow))
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in EXIT}
    totals = [style(f"{count} {verdict}", COLOURS[verdict]) for verdict, count in counts.items() if count]
    return "\n".join([*lines, "", ", ".join(totals)])


def _crashed(facts: Facts, name: str, error: Exception) -> Check:
    if exhausted(error):
        remedy = f"run {facts.command('doctor', name)} from a shell with more, after `ulimit -n {ENOUGH_DESCRIPTORS}`"
        return Check(name, "fail", "it cannot be looked at: no file descriptor is left for this command", remedy)
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(at.filename)}:{at.lineno}"
    cause = f"the check itself failed: {type(error).__name__} at {where}: {facts.quote(shown(str(error)))}"
    return Check(
        name, "fail", cause, f"this is a bug of doctor: please report it with {facts.command('doctor', '--bundle')}"
    )
