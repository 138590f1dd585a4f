"""Names from everywhere: keys go there and back, and recognising a path never fails."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import assume, example, given
from hypothesis import strategies as st

from everos_engine.system import files
from everos_engine.text import kinds
from fuzz.scratch import SCRATCH

PARTS = st.sampled_from(
    ["users", "agents", "u1", "episodes", ".atomic_facts", ".foresights", ".cases", "skills", "references", "SKILL.md",
     "user.md", "a.md", ".md", "~a.md", "#a.md", ".index", "", ".", "..", "default_app", "default_project", "A.MD"]
)  # fmt: skip
GLOBS = st.lists(
    st.sampled_from(["**/*.md", "*", "[", "[!a]*", "notes/**", "?.md", "**"]) | st.text(max_size=6), max_size=3
)
PATHS = st.lists(PARTS | st.text(max_size=6), max_size=8).map("/".join)


@given(PATHS, GLOBS)
def test_recognising_never_fails_and_is_stable(path: str, globs: list[str]) -> None:
    found = kinds.recognise(path, note_globs=tuple(globs))
    if found is None:
        return
    assert found.kind in kinds.KINDS
    assert not path.startswith(".index/")
    again = kinds.recognise(found.md_path, note_globs=tuple(globs))
    assert again == found, "the key of a change is of the same change"
    if found.kind != "note":
        assert found.owner_type in {"user", "agent"}
        assert found.owner_id
        assert found.owner_id in path.split("/")


NAMES = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.text(min_size=1, max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(
        st.sampled_from([b"\\x", b"ff", b"\\", b"e9", b"\xe9", b"\xff", b"a", "e\u0301".encode()]), min_size=1
    ).map(b"".join),
)


@given(st.lists(NAMES, min_size=1, max_size=3))
@example([rb"caf\xe9.md"])
@example([b"caf\xe9.md"])
@example([b"\xe9", rb"\xe9.md"])
def test_a_key_leads_back_to_its_file(names: list[bytes]) -> None:
    parts = [name.replace(b"/", b"").replace(b"\0", b"") for name in names]
    assume(all(part not in {b"", b".", b"..", b".index"} and len(part) < 200 for part in parts))
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        root = Path(os.path.realpath(directory))
        path = os.path.join(os.fsencode(root), *parts) + b".md"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(b"x")
        key = files.key_of(root, os.fsdecode(path))
        assert key is not None
        key.encode()
        back = files.path_of(root, key)
        assert os.path.samefile(back, path)
        walked = files.walk(root, lambda seen: kinds.Place(seen, "note", "", "", "", ""))
        assert set(walked.found) == {key}


@given(st.text(max_size=30))
def test_a_path_outside_the_root_has_no_key(text: str) -> None:
    assume("\0" not in text)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        root = Path(os.path.realpath(directory)) / "root"
        root.mkdir()
        (root.parent / "root2").mkdir()
        for outside in (f"{root}2/{text}", f"{root}/../root2/{text}"):
            key = files.key_of(root, outside)
            inside = os.path.normpath(outside).startswith(str(root) + os.sep)
            assert inside or key is None
