"""Checks of what lies under the engine: the root and its mounts, permissions, disk, clock, limits, versions."""

from __future__ import annotations

import os
import platform
import stat
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from everos_engine.diagnose.checkup import Check, Facts, Verdict, conditions_of
from everos_engine.diagnose.engine_state import number
from everos_engine.diagnose.permission import blocked, may, permit
from everos_engine.diagnose.wording import ago, plural, quoted, size
from everos_engine.errors import SettingsError
from everos_engine.stores.held import BLIND_REMEDY
from everos_engine.system import ceiling, files, limits, private

GOOD_DESCRIPTORS = 256
"""The engine needs up to 64 apart from pinned indexes, and some to start. With few, work waits for descriptors."""
MAX_DESCRIPTORS = 1 << 20
"""What an unlimited limit counts as."""
DESCRIPTOR_NOTES = "descriptor"
"""How the codes of the guard's conditions begin."""
MIN_MEMORY_BYTES, GOOD_MEMORY_BYTES = 128 << 20, 512 << 20
MIN_DISK_BYTES, GOOD_DISK_BYTES = 32 << 20, 256 << 20
MIN_INODES, GOOD_INODES = 200, 2000
WATCHES = 524_288
INSTANCES = 512
LANCEDB = "0.40."
SYSCTL = "echo fs.inotify.{name}={value} | {sudo}tee -a /etc/sysctl.conf && {sudo}sysctl -p"


def check_versions(facts: Facts) -> Check:
    """Report the versions that run here. LanceDB's descriptor behaviour was measured on one minor version."""
    lance = version("lancedb")
    cause = (
        f"everos-engine {version('everos-engine') or '(from source)'}, lancedb {lance}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.release()}"
    )
    if lance.startswith(LANCEDB):
        return Check("versions", "ok", cause)
    remedy = f"install the one this was measured on: {facts.shell(sys.executable, '-m', 'pip', 'install', f'lancedb=={LANCEDB}*')}"
    return Check("versions", "warn", f"{cause}: not lancedb {LANCEDB}x", remedy)


def check_root(facts: Facts) -> Check:
    """Check that the root is a directory that can be read, in every part."""
    root = os.fspath(facts.settings.root)
    if not os.path.isdir(root):
        what = "is not a directory" if os.path.lexists(root) else "does not exist"
        remedy = f"mount it or move it back, or name another with --root. To make a new one: {facts.shell('mkdir', '-p', root)}"
        return Check("root", "fail", f"the memory root {facts.show(root)} {what}", remedy)
    tree = facts.tree
    if tree.closed:
        directory, reason = tree.closed[0]
        barrier, need = blocked(root, directory)
        cause = f"{plural(len(tree.closed), 'directory', 'directories')} cannot be read, the first {facts.show(barrier)} ({reason}): what is in there is not seen"
        return Check("root", "fail", cause, BLIND_REMEDY if may(barrier, os.R_OK | os.X_OK) else permit(barrier, need))
    if tree.unreadable:
        path = tree.unreadable[0]
        cause = f"{plural(len(tree.unreadable), 'file')} cannot be read, the first {facts.show(path)}"
        return Check("root", "warn", cause, permit(path, "r"))
    if not tree.files and not tree.index_directories and not any(os.scandir(root)):
        remedy = "if a file system belongs there, mount it. Otherwise put memory into it: `everos-engine kinds` shows the layout"
        return Check("root", "warn", f"{facts.show(root)} is empty, and was never indexed", remedy)
    found = f"{plural(tree.files, 'matching file')} in {plural(tree.directories, 'directory', 'directories')}"
    links = f"; {plural(len(tree.linked), 'link')} to directories not followed" if tree.linked else ""
    return Check("root", "ok", f"{facts.show(root)}: {found}{links}")


def check_index_writable(facts: Facts) -> Check:
    """Check that the engine's own folder can be written, or made."""
    settings = facts.settings
    at: Path = settings.lancedb_directory if settings.lancedb_directory.exists() else settings.engine_directory
    while not at.exists() and at != at.parent:
        at = at.parent
    for path in (at, settings.engine_directory, facts.engine_db):
        if path.exists() and not may(os.fspath(path), os.W_OK | (os.X_OK if path.is_dir() else 0)):
            if files.is_readonly(path):
                break  # no permission helps
            cause = f"{facts.show(os.fspath(path))} may not be written by uid {os.geteuid()}"
            index = settings.index_directory
            if path.stat().st_uid == os.geteuid():
                return Check(
                    "permissions", "fail", cause, f"give it back: {facts.shell('chmod', '-R', 'u+rwX', index)}"
                )
            owner = f"{os.geteuid()}:{os.getegid()}"
            remedy = f"run doctor as the engine's user. If you are that user, `{sudo()}{quoted('chown', '-R', owner, index)}`"
            return Check("permissions", "fail", cause, remedy)
    if files.is_readonly(at):
        point = limits.mount_of(at).point
        cause = f"the index lies on {facts.show(point)}, which is mounted read-only: searches work, and nothing is brought in step"
        return Check("permissions", "fail", cause, f"mount it for writing: {_remount(point)}")
    return Check("permissions", "ok", f"the index may be written by uid {os.geteuid()}")


def _remount(point: str) -> str:
    return f"`{sudo()}{quoted('mount', '-o', 'remount,rw', point)}`"


def check_private(facts: Facts) -> Check | None:
    """Check that no other user can read the index, because it holds the text of private files."""
    index = facts.settings.index_directory
    if not index.is_dir():
        return None
    found = private.too_open(facts.settings)
    if found is None:
        who = "its owner and its group" if facts.settings.memory.index_access == "group" else "its owner"
        return Check("private", "ok", f"only {who} can read the index")
    mode = stat.S_IMODE(os.stat(found).st_mode)
    cause = f"{facts.show(found)} has mode {mode:04o}: other users can read the text of every file that is indexed"
    chmod = quoted("chmod", "o-rwx" if facts.settings.memory.index_access == "group" else "go-rwx", found)
    if os.stat(found).st_uid not in {os.geteuid(), 0} and os.geteuid() != 0:
        return Check("private", "warn", cause, f"as its owner, `{chmod}`")
    return Check("private", "warn", cause, f"remove that permission: `{chmod}`. The engine does so too when it starts")


def check_mounts(facts: Facts) -> Check:
    """Check that file events come from this mount, and from those inside the root."""
    every = limits.mounts()
    root = os.fspath(facts.settings.root)
    own = limits.mount_below(root, every)
    inside = limits.mounts_inside(root, every)
    where = f"{own.type} at {facts.show(own.point)}"
    for mount in (own, *inside):
        reason = limits.silence(mount)
        if reason is None or (limits.delivers_events(mount) and mount is own and not inside):
            continue
        polling = facts.engine.watch.get("polling")
        if polling or limits.delivers_events(mount):
            return Check(
                "mount", "ok", f"{facts.show(mount.point)} is {reason}" + ("; it is polled" if polling else "")
            )
        remedy = f"poll: {facts.command('run', '--poll')}; or scan more often, `export EVEROS_SCAN_INTERVAL_SECONDS=5`"
        return Check("mount", "warn", f"{facts.show(mount.point)} is {reason}", remedy)
    if "ro" in own.options:
        cause = f"{where} is mounted read-only, so no index can be written"
        return Check("mount", "fail", cause, f"mount it for writing: {_remount(own.point)}")
    layers = f", {limits.silence(own)}" if limits.silence(own) else ""
    return Check("mount", "ok", where + layers + (f", and {plural(len(inside), 'mount')} inside" if inside else ""))


def check_descriptors(facts: Facts) -> Check:
    """Check that the limit holds what the engine may need, and that the running one stays under its budget.

    The hard limit counts, because an engine raises the soft one to it when it starts.
    """
    hard = (_limit_of(facts.engine.pid) or limits.descriptors())[1]
    limit = MAX_DESCRIPTORS if hard == limits.UNLIMITED else hard
    reported = [note for note in conditions_of(facts) if note.code.startswith(DESCRIPTOR_NOTES)]
    sample = facts.engine.descriptors
    whose = f"the engine's limit is {limit:,}" if facts.engine.pid else f"this shell's limit is {limit:,}"
    lancedb = facts.settings.lancedb
    pinned, asked = lancedb.descriptor_mode == "pinned", lancedb.index_cache_size_bytes
    wanted = ceiling.ceiling_of(
        facts.settings, cap_bytes=0 if isinstance(asked, str) else asked, pinned=pinned, limit=limit
    )
    good = max(4 * GOOD_DESCRIPTORS, ceiling.HEADROOM * wanted)
    raising = f"start the engine from a new shell after `ulimit -n {good}` (as root where that is refused), or with LimitNOFILE={good} in its unit"
    remedy = f"{raising}; {facts.restart()}" if facts.engine.pid else raising
    try:
        most = ceiling.cap_of(lancedb, limit=limit)
    except SettingsError as error:
        return Check("descriptors", "fail", f"{whose}: the engine would not start: {facts.quote(str(error))}", remedy)
    needed = ceiling.ceiling_of(facts.settings, cap_bytes=most, pinned=pinned, limit=limit)
    count = (
        f"{number(sample.get('count')):,.0f} open, at most {number(sample.get('peak')):,.0f} so far; " if sample else ""
    )
    cause = f"{count}{whose}, the engine needs up to {needed:,}"
    if limit < ceiling.MIN_LIMIT:
        return Check("descriptors", "fail", cause, remedy)
    if reported:
        words = "; ".join(f"{note.code}: {facts.quote(note.message)}" for note in reported)
        return Check(
            "descriptors", "warn", f"{words}; {cause}", facts.program_in("; ".join(note.remedy for note in reported))
        )
    if limit < max(GOOD_DESCRIPTORS, ceiling.HEADROOM * needed):
        return Check(
            "descriptors", "warn", f"{cause}: {max(GOOD_DESCRIPTORS, ceiling.HEADROOM * needed)} leave it room", remedy
        )
    return Check("descriptors", "ok", cause)


def check_inotify(facts: Facts) -> Check:
    """Check that every directory of the tree can be watched."""
    bounds = limits.inotify(usage=True)
    needed = facts.tree.directories
    if facts.settings_watch_off or bounds.watches is None:
        return Check(
            "inotify",
            "ok",
            "not used: nothing is watched" if facts.settings_watch_off else "not reported by this system",
        )
    mine = needed if facts.engine.watch.get("watching") else 0
    left = bounds.watches - max(0, bounds.watches_used - mine)
    cause = f"{plural(needed, 'directory', 'directories')} to watch, {left:,} of {bounds.watches:,} watches left"
    if needed > left:
        value = max(WATCHES, 2 * (needed + bounds.watches_used))
        remedy = _raise(bounds.watches_name, "max_user_watches", value)
        return Check("inotify", "warn", f"{cause}: changes are found only by a scan", remedy)
    if bounds.instances is not None and not mine and bounds.instances_used >= bounds.instances:
        cause = f"all {bounds.instances} inotify instances of this user are in use: changes are found only by a scan"
        return Check("inotify", "warn", cause, _raise(bounds.instances_name, "max_user_instances", INSTANCES))
    return Check("inotify", "ok", cause)


def check_memory(_: Facts) -> Check:
    """Check that there is memory to work in."""
    left = limits.memory_available()
    if left is None:
        return Check("memory", "ok", "not reported by this system")
    cause = f"{size(left)} available"
    if left >= GOOD_MEMORY_BYTES:
        return Check("memory", "ok", cause)
    verdict: Verdict = "fail" if left < MIN_MEMORY_BYTES else "warn"
    remedy = "close other programs, or raise the container's memory limit. `export EVEROS_WORKER_BATCH_MAX=50` makes do with less"
    return Check("memory", verdict, f"{cause}; {size(GOOD_MEMORY_BYTES)} let it work at full speed", remedy)


def check_disk(facts: Facts) -> Check:
    """Check that there is space, and that there are inodes, where the index is written."""
    at = facts.settings.lancedb_directory
    while not at.exists() and at != at.parent:
        at = at.parent
    found = os.statvfs(at)
    free, inodes = found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
    where = limits.mount_of(at).point
    cause = f"{size(free)} free on {facts.show(where)}"
    verdict: Verdict
    if inodes is not None and inodes < GOOD_INODES:
        verdict = "fail" if inodes < MIN_INODES else "warn"
        remedy = f"remove files there: {facts.shell('df', '-i', where)} shows the count; it goes on by itself"
        return Check("disk", verdict, f"only {inodes:,} inodes left on {facts.show(where)}", remedy)
    if free >= GOOD_DISK_BYTES:
        return Check("disk", "ok", cause)
    verdict = "fail" if free < MIN_DISK_BYTES else "warn"
    remedy = (
        f"free at least {size(GOOD_DISK_BYTES)} there: {facts.shell('du', '-xh', '-d', '1', where)} shows what takes the room; "
        f"the engine goes on by itself, else {facts.again()}"
    )
    return Check("disk", verdict, f"only {cause}; {size(GOOD_DISK_BYTES)} let the index be compacted", remedy)


def check_clock(facts: Facts) -> Check:
    """Check that no file has a time of last change in the future, and no full scan ran there."""
    scan = None if facts.queue is None else facts.queue.last_scan_milliseconds
    ahead = 0.0 if scan is None else scan / 1000 - facts.now_seconds
    if ahead > 2:
        remedy = f"set the clock (`{sudo()}timedatectl set-ntp true`), then {facts.again()}"
        return Check("clock", "warn", f"the last scan ran {ago(ahead)} in the future: the clock was set back", remedy)
    if facts.tree.future:
        path, seconds = max(facts.tree.future, key=lambda one: one[1])
        cause = (
            f"{plural(len(facts.tree.future), 'file')} with a time of last change in the future, {facts.show(path)} by {ago(seconds)}: "
            "read again with every scan, since their times cannot be trusted"
        )
        root = facts.settings.root
        find = quoted("find", root, "-name", "*.md", "-newermt", "now", "-exec", "touch", "{}", "+")
        return Check("clock", "warn", cause, f"if this clock is right, give them today's time: `{find}`")
    return Check("clock", "ok", "no file has a time in the future")


def sudo() -> str:
    """Return the prefix that a command needs to run as root."""
    return "" if os.geteuid() == 0 else "sudo "


def version(package: str) -> str:
    """Return the installed version of a package, or "" if it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def _raise(bound: str, name: str, value: int) -> str:
    """Return the remedy that raises an inotify bound: of this user namespace, or permanently of the system."""
    if bound.startswith("user."):
        path = "/proc/sys/" + bound.replace(".", "/")
        return f"raise it: `echo {value} | {sudo()}tee {path}`, then restart the engine"
    return f"raise it: `{SYSCTL.format(name=name, value=value, sudo=sudo())}`, then restart the engine"


def _limit_of(pid: int | None) -> tuple[int, int] | None:
    """Return the (soft, hard) descriptor limit of a process, or None if the system does not report it."""
    try:
        text = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    for line in text.splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            return tuple(int(one) if one.isdigit() else limits.UNLIMITED for one in (soft, hard))  # type: ignore[return-value]  # two in, two out
    return None
