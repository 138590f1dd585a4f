from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.system import limits
from everos_engine.system.limits import Mount

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:40 / /mnt/c rw,noatime - 9p C:\134 rw,dirsync,aname=drvfs;path=C:\
41 27 0:41 / /srv/my\040notes rw,relatime shared:7 master:2 - nfs4 box:/notes rw,vers=4.2
42 27 0:42 / /srv/my\040notes rw,relatime - tmpfs tmpfs rw,size=4k
43 27 0:43 / /cloud rw - fuse.rclone remote: rw,user_id=0
44 27 0:44 / /merged rw - overlay overlay rw,lowerdir=/a
torn line
"""


def test_mounts_are_read_with_their_escapes_and_optional_fields() -> None:
    found = limits.parse_mounts(MOUNTINFO)
    assert [mount.type for mount in found] == ["proc", "ext4", "9p", "nfs4", "tmpfs", "fuse.rclone", "overlay"]
    assert found[3].point == "/srv/my notes"
    assert found[3].options == ("rw", "relatime", "vers=4.2")
    assert found[2].source == "C:\\"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/mnt/c", "9p"),
        ("/mnt/c/Users/ada", "9p"),
        ("/mnt/cold", "ext4"),
        ("/srv/my notes/x", "tmpfs"),
        ("/home/ada", "ext4"),
    ],
)
def test_a_path_lies_on_the_longest_and_latest_mount_above_it(path: str, kind: str) -> None:
    assert limits.mount_below(path, limits.parse_mounts(MOUNTINFO)).type == kind


def test_mounts_inside_a_directory_are_those_strictly_below_it() -> None:
    inside = limits.mounts_inside("/srv", limits.parse_mounts(MOUNTINFO))
    assert [mount.type for mount in inside] == ["nfs4", "tmpfs"]
    assert limits.mounts_inside("/mnt/c", limits.parse_mounts(MOUNTINFO)) == []


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "drvfs", "virtiofs", "fuse.sshfs", "fuse", "fuseblk"]
)
def test_network_host_and_fuse_mounts_deliver_no_events(kind: str) -> None:
    assert not limits.delivers_events(Mount("/", kind))
    assert kind in (limits.silence(Mount("/", kind)) or "")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "zfs", "unknown"])
def test_local_mounts_deliver_all_events(kind: str) -> None:
    assert limits.delivers_events(Mount("/", kind))
    assert limits.silence(Mount("/", kind)) is None


def test_an_overlay_delivers_events_but_not_for_its_layers() -> None:
    assert limits.delivers_events(Mount("/", "overlay"))
    assert "layers" in (limits.silence(Mount("/", "overlay")) or "")


def test_the_mount_of_a_real_path_agrees_with_its_device(tmp_path: Path) -> None:
    mount = limits.mount_of(tmp_path)
    assert mount.type != "unknown"
    assert os.stat(mount.point).st_dev == os.stat(tmp_path).st_dev


def test_bounds_and_use_of_this_machine_are_told() -> None:
    held = limits.inotify(usage=True)
    assert held.watches is not None
    assert held.watches > 0
    assert held.watches_used >= 0
    assert limits.descriptors() == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (limits.memory_available() or 0) > 1 << 20


def test_meminfo_is_read_in_bytes() -> None:
    assert limits.parse_meminfo("MemAvailable:    2 kB\nHugePages_Total:  3\nodd\n") == {
        "MemAvailable": 2048,
        "HugePages_Total": 3,
    }


@given(st.text(max_size=200))
def test_no_text_of_the_kernel_breaks_the_parsers(text: str) -> None:
    assert isinstance(limits.parse_mounts(text), list)
    assert isinstance(limits.parse_meminfo(text), dict)
