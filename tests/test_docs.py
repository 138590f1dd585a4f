from __future__ import annotations

import ast
import plistlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from everos_engine.cli.main import main, parser
from everos_engine.settings import Settings, load
from everos_engine.text import kinds

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))
import generate  # noqa: E402 - beside the pages it writes


def test_the_generated_pages_are_those_of_the_code() -> None:
    stale = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (stale.returncode, stale.stdout) == (0, "")


def test_an_event_without_a_meaning_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    events, notes = generate.found()
    assert "engine_started" in events
    assert {"watch_limit", "instance_limit", "watch_failed"} <= notes  # said by a variable
    monkeypatch.setattr(generate, "found", lambda: ({**events, "a_new_event": (set(), set())}, notes))
    with pytest.raises(SystemExit, match=r"docs/events\.toml: say under \[events\] what 'a_new_event' means"):
        generate.events_page()


def test_an_event_that_cannot_be_told_from_the_source_is_refused() -> None:
    call = ast.parse("logger.info(words())").body[0].value.args[0]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match=r"loops\.py:1: cannot tell the event"):
        generate._words(call, {}, Path("loops.py"))


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("everos-engine ")


def test_every_test_and_file_that_the_docs_name_exists() -> None:
    repository = DOCS.parent
    code = "".join(path.read_text() for folder in ("tests", "fuzz") for path in (repository / folder).rglob("*.py"))
    tests = set(re.findall(r"def (test_\w+)", code))
    pages = [*DOCS.rglob("*.md"), *repository.glob("*.md")]
    text = "".join(path.read_text() for path in pages if "_build" not in path.parts)
    named = {name for name in re.findall(r"`(test_\w+)`", text) if not (repository / "tests" / f"{name}.py").exists()}
    assert named <= tests
    roots = [repository, repository / "engine" / "everos_engine"]
    files = set(
        re.findall(
            r"`((?:docs|tests|fuzz|examples|engine/everos_engine|loops|stores|embed|system|diagnose|cli|calibrate|text)/[\w/.-]+\.\w+)`",
            text,
        )
    )
    assert {name for name in files if not any((root / name).exists() for root in roots)} == set()


def test_the_service_files_call_the_engine_as_it_wants_to_be_called() -> None:
    services = DOCS.parent / "examples" / "service"
    unit = (services / "everos-engine.service").read_text()
    (started,) = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    agent = plistlib.loads((services / "everos-engine.plist").read_bytes())
    for command in (started.split(), agent["ProgramArguments"]):
        assert parser().parse_args(command[1:]).command.__name__ == "_run"
    (grace,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert min(int(grace), agent["ExitTimeOut"]) > Settings().shutdown_grace_seconds


def test_the_file_shown_in_kinds_is_indexed_whole() -> None:
    (shown,) = re.findall(r"```markdown\n(.*?)```", (DOCS / "kinds.md").read_text(), re.DOTALL)
    place = kinds.recognise("users/ada/.atomic_facts/atomic_fact-2025-03-01.md")
    assert place is not None
    document = kinds.parse(place, {place.md_path: shown.encode()})
    assert ([entry.entry_id for entry in document.entries], list(document.problems)) == (["af_20250301_00000001"], [])


def test_the_settings_file_shown_is_taken(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", (DOCS / "settings.md").read_text(), re.DOTALL)
    (tmp_path / "everos-engine.toml").write_text(shown)
    assert load({"memory.root": str(tmp_path)}, environment={}).note.globs == ("**/*.md",)
