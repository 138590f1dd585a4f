from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from pathlib import Path

import pytest

from everos_engine.diagnose import bundle, doctor
from everos_engine.diagnose.checkup import Check, Facts, gather
from everos_engine.engine import open_engine
from everos_engine.errors import SettingsError
from everos_engine.settings import Settings, load
from everos_engine.testing import FakeEmbedder
from writer import fact, facts, put

SECRETS = ("zanzibar", "quokka", "marzipan", "hunter2", "internal.example", "periwinkle", "turnip", "fandango")


@pytest.fixture
def private(tmp_path: Path) -> Settings:
    """Every place a secret can stand in has one: root, owner, file, entry, id, error, key, URL, model, glob, toml."""
    root = tmp_path / "zanzibar"
    flags = {
        "memory.root": str(root),
        "embedder.api_key": "hunter2",
        "embedder.url": "http://internal.example/v1",
        "embedder.model": "fandango",
        "embedder.deadline_seconds": 0.5,
        "note.globs": ["turnip/*.md"],
    }
    text = facts(fact(1, "the marzipan is hidden")).replace("af_20250227_00000001", "af_periwinkle")
    put(root, "users/quokka/.atomic_facts/atomic_fact-quokka.md", text.replace(": u1", ": quokka"))
    put(root, "users/quokka/.atomic_facts/bad.md", "---\nmarzipan: [\n---\n" + text)
    put(root, "users/quokka/.atomic_facts/other.md", text)  # the owner differs: the error quotes the file
    put(root, "turnip/quokka.md", "# marzipan\n\nperiwinkle\n")
    (root / "users" / "linked-quokka").symlink_to(root / "turnip")
    os.utime(root / "turnip" / "quokka.md", (4_000_000_000, 4_000_000_000))
    return load(flags, environment={}, user_file=root / "none.toml")


async def test_a_bundle_holds_no_content_no_name_and_no_key(private: Settings, tmp_path: Path) -> None:
    async with open_engine(private, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        (private.root / "turnip" / "quokka.md").unlink()
        written = bundle.write(private, tmp_path / "beside.tar.gz", offline=True)
        assert_private(written)
    told = assert_private(bundle.write(private, tmp_path / "offline.tar.gz", offline=True))
    assert {change["status"] for change in told["changes.json"]} >= {"failed"}
    assert told["settings.json"]["embedder.api_key"] == "(set)"
    assert told["settings.json"]["scan_interval_seconds"] == 30.0
    assert {check["name"] for check in told["doctor.json"]} >= {"queue", "failed", "index", "root"}


def test_a_dead_embedder_and_a_damaged_database_are_bundled_without_their_words(
    private: Settings, tmp_path: Path
) -> None:
    flags = {
        "memory.root": str(private.root),
        "embedder.kind": "http",
        "embedder.url": "http://127.0.0.1:9/internal.example",
    }
    http = load(
        {**flags, "embedder.model": "fandango", "embedder.api_key": "hunter2"},
        environment={},
        user_file=tmp_path / "none.toml",
    )
    http.engine_directory.mkdir(parents=True)
    (http.engine_directory / "engine.db").write_bytes(b"marzipan" * 1000)
    told = assert_private(bundle.write(http, tmp_path / "http.tar.gz"))
    verdicts = {check["name"]: check["verdict"] for check in told["doctor.json"]}
    assert (verdicts["queue"], verdicts["embedder"]) == ("fail", "fail")


def test_a_crash_of_a_check_is_a_failed_check_and_quotes_nothing_in_a_bundle(private: Settings) -> None:
    def crash(_: Facts) -> Check:
        message = "marzipan"
        raise ValueError(message)

    case = gather(private, program="everos-engine", offline=True)
    checks = (("first", crash), *doctor.CHECKS[:1])
    first, second = doctor.run(case, checks=checks)
    assert (first.name, first.verdict, second.name) == ("first", "fail", "versions")
    assert "ValueError at test_bundle.py" in first.cause
    assert "marzipan" in first.cause
    (silent, _) = doctor.run(dataclasses.replace(case, quote=lambda _: "(left out)"), checks=checks)
    assert "marzipan" not in silent.cause


def test_a_bundle_replaces_no_file(private: Settings, tmp_path: Path) -> None:
    target = tmp_path / "there.tar.gz"
    target.write_text("mine")
    with pytest.raises(SettingsError, match="File exists"):
        bundle.write(private, target, offline=True)
    assert target.read_text() == "mine"


def assert_private(written: Path) -> dict[str, list[dict[str, object]] | dict[str, object]]:
    """No secret anywhere in the archive; its JSON members by name."""
    assert written.stat().st_mode & 0o077 == 0
    told = {}
    with tarfile.open(written) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            content = file.read()
            found = [
                secret for secret in SECRETS if secret.encode() in content.lower() or secret in member.name.lower()
            ]
            assert not found, (member.name, content.decode())
            assert (member.uname, member.gname) == ("", "")
            if member.name.endswith(".json"):
                told[member.name.rpartition("/")[2]] = json.loads(content)
    assert set(told) == {"doctor.json", "status.json", "changes.json", "settings.json", "system.json", "pulse.json"}
    return told
