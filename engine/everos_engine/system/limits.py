"""Read what the system allows: file descriptors, inotify watches, memory, and what the mount of a path can do.

The parsers are pure functions of the kernel's text. The functions next to them read that text.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = -1
_OCTAL = re.compile(r"\\([0-7]{3})")
_NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "lustre", "gfs2", "ocfs2", "gpfs"),
    *("beegfs", "davfs", "coda", "orangefs", "pvfs2"),
}
_HOST = {"9p", "drvfs", "virtiofs", "vboxsf", "vmhgfs", "prl_fs", "hgfs"}
_LAYERED = {"overlay", "overlayfs", "aufs", "unionfs"}


@dataclass(frozen=True, slots=True)
class Mount:
    """Describe a mounted file system. Its ``type`` is for example ``ext4``."""

    point: str
    type: str
    source: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Inotify:
    """Hold the kernel's bounds per user, or None, and what this user's visible processes use.

    The names are those of the sysctls: ``user.*`` of a user namespace, or ``fs.inotify.*`` of the system.
    """

    watches: int | None
    instances: int | None
    watches_used: int = 0
    instances_used: int = 0
    watches_name: str = ""
    instances_name: str = ""


def parse_mounts(text: str) -> list[Mount]:
    """Return the lines of ``/proc/self/mountinfo``, in order. An unreadable line is left out."""
    found = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 3:
            continue
        options = dict.fromkeys([*fields[5].split(","), *rest[2].split(",")])
        found.append(Mount(_unescape(fields[4]), rest[0], _unescape(rest[1]), tuple(options)))
    return found


def mount_below(path: str, mounts: Iterable[Mount]) -> Mount:
    """Return the mount of an absolute, resolved path.

    Of two mounts on one point, the later hides the earlier.
    """
    best = Mount("/", "unknown")
    for mount in mounts:
        base = mount.point.rstrip("/")
        if (path == mount.point or path.startswith(base + "/")) and len(mount.point) >= len(best.point):
            best = mount
    return best


def mounts_inside(path: str, mounts: Iterable[Mount]) -> list[Mount]:
    """Return the mounts strictly below a directory: parts of the tree that are on another file system."""
    return [mount for mount in mounts if mount.point.startswith(path.rstrip("/") + "/")]


def mounts() -> list[Mount]:
    """Return all mounts that this process sees, or none if the system does not report them."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    return parse_mounts(text)


def mount_of(path: str | os.PathLike[str]) -> Mount:
    """Return the mount of a path, links resolved.

    Its type is ``unknown`` if the system does not report it.
    """
    return mount_below(os.path.realpath(path), mounts())


def delivers_events(mount: Mount) -> bool:
    """Return whether file events report the changes on this mount.

    They do not on network shares, host folders and FUSE.
    """
    return not (mount.type in _NETWORK | _HOST or mount.type.partition(".")[0] in {"fuse", "fuseblk"})


def silence(mount: Mount) -> str | None:
    """Return in words which changes on this mount raise no event, or None if all of them do."""
    if mount.type in _NETWORK:
        return f"a network share ({mount.type}): changes made on other machines raise no events"
    if mount.type in _HOST:
        return f"a folder of the host ({mount.type}): changes made by the host raise no events"
    if not delivers_events(mount):
        return f"a FUSE file system ({mount.type}): changes made behind it raise no events"
    if mount.type in _LAYERED:
        return f"a layered file system ({mount.type}): changes made directly in its layers raise no events"
    return None


def inotify(*, usage: bool = False) -> Inotify:
    """Return the bounds of this user namespace and the system. ``usage`` also counts what is held."""
    (watches, watches_name), (instances, instances_name) = (
        _min_of(f"fs.inotify.max_user_{name}", f"user.max_inotify_{name}") for name in ("watches", "instances")
    )
    held = _inotify_held() if usage else (0, 0)
    return Inotify(watches, instances, *held, watches_name, instances_name)


def own_watches() -> int | None:
    """Return how many inotify watches this process holds, or None if the system does not report it."""
    handles = _listed("/proc/self/fd")
    return _held_of("self", handles)[0] if handles else None


def descriptors() -> tuple[int, int]:
    """Return the (soft, hard) limit of open file descriptors. -1 is unlimited."""
    soft, hard = (
        UNLIMITED if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard


def parse_meminfo(text: str) -> dict[str, int]:
    """Return ``/proc/meminfo`` as bytes by name."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            found[name] = int(number[0]) * (1024 if number[1:] == ["kB"] else 1)
    return found


def memory_available() -> int | None:
    """Return the bytes of memory that may still be used, or None if that is unknown.

    Both the system and the control group of this process limit them.
    """
    bounds = []
    with suppress(OSError):
        bounds.append(parse_meminfo(Path("/proc/meminfo").read_text(encoding="utf-8")).get("MemAvailable"))
    for folder, max_name, used_name, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, now = _number(f"{folder}/{max_name}"), _number(f"{folder}/{used_name}")
        if limit is not None and now is not None:
            bounds.append(max(0, limit - now + _statistic(f"{folder}/memory.stat", cache)))
    known = [bound for bound in bounds if bound is not None]
    return min(known) if known else None


def _inotify_held() -> tuple[int, int]:
    """Return (watches, instances) of those processes of this user that this process may inspect."""
    watches = instances = 0
    for process in _listed("/proc"):
        if not process.isdigit() or _owner(f"/proc/{process}") != os.getuid():
            continue
        more_watches, more_instances = _held_of(process, _listed(f"/proc/{process}/fd"))
        watches, instances = watches + more_watches, instances + more_instances
    return watches, instances


def _held_of(process: str, handles: Iterable[str]) -> tuple[int, int]:
    """Return (watches, instances) among the open descriptors of one process."""
    watches = instances = 0
    for handle in handles:
        with suppress(OSError):
            if os.readlink(f"/proc/{process}/fd/{handle}") in {"anon_inode:inotify", "inotify"}:
                info = Path(f"/proc/{process}/fdinfo/{handle}").read_text(encoding="ascii", errors="replace")
                watches += info.count("inotify wd:")
                instances += 1
    return watches, instances


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except OSError:
        return None


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _min_of(*sysctls: str) -> tuple[int | None, str]:
    """Return the smallest of these bounds and its name. Of equals it is the first."""
    found = [(_number("/proc/sys/" + name.replace(".", "/")), name) for name in sysctls]
    known = [(number, name) for number, name in found if number is not None]
    return min(known, key=lambda one: one[0]) if known else (None, "")


def _statistic(path: str, name: str) -> int:
    """Return one number of a file of ``name number`` lines, or 0 if it is not there."""
    with suppress(OSError, ValueError):
        for line in Path(path).read_text(encoding="ascii").splitlines():
            word, _, value = line.partition(" ")
            if word == name:
                return int(value)
    return 0


def _number(path: str) -> int | None:
    """Return the whole number that a file of the kernel holds, or None for ``max`` and for no file."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def _unescape(text: str) -> str:
    r"""Replace ``\040`` and similar, as the kernel writes spaces, tabs, newlines and backslashes."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
