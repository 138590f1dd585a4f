from __future__ import annotations

from pathlib import Path

import pytest

from everos_engine.keys import key_of
from everos_engine.settings import Settings
from everos_engine.system import files


def save(root: Path, name: bytes) -> str:
    path = (bytes(root) + b"/" + name).decode("utf-8", "surrogateescape")
    Path(path).write_text("# H\ntext")
    return path


def test_a_name_that_looks_like_an_escaped_byte_has_a_key_of_its_own(root: Path) -> None:
    paths = [save(root, name) for name in (b"caf\xe9.md", rb"caf\xe9.md", b"\xe9" + rb"\xe9.md", rb"\x5c.md")]
    keys = [str(files.key_of(root, path)) for path in paths]
    assert len(set(keys)) == len(keys)
    assert [files.path_of(root, key) for key in keys] == paths


@pytest.mark.parametrize("name", [b"caf\xe9.md", rb"caf\xe9.md", b"plain.md"])
def test_a_key_as_listed_names_its_file_on_the_command_line(name: bytes, settings: Settings, root: Path) -> None:
    key = str(files.key_of(root, save(root, name)))
    assert key_of(settings, key) == key


@pytest.mark.parametrize(
    ("standing", "asked", "meant"),
    [
        ("..", "{root}/a/gone.md", "a/gone.md"),
        ("a", "gone.md", "gone.md"),
        ("a", "a/gone.md", "a/gone.md"),
        ("a", "b/gone.md", "b/gone.md"),
        ("..", "elsewhere/gone.md", "elsewhere/gone.md"),
    ],
)
def test_a_deleted_file_is_looked_for_where_its_directory_is(
    standing: str, asked: str, meant: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").mkdir()
    (root.parent / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(root / standing)
    assert files.locate(root, asked.format(root=root.name)) == str(root / meant)
