from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everos_engine import trust
from everos_engine.cli.main import main
from everos_engine.errors import SettingsError
from everos_engine.settings import (
    ROOT_SETTINGS_FILE,
    EmbedderSettings,
    Settings,
    describe,
    load,
    masked_url,
    secrets_of,
    setters,
    table,
)

NAMES = [name for name, *_ in table()]
DESTINATIONS = {
    "memory.root",
    "memory.index_access",
    "lancedb.history_file",
    "embedder.url",
    "embedder.model",
    "embedder.api_key",
    "embedder.calls_per_second",
}
"""What a root's own file may never change, whatever it says; and of ``embedder.kind`` it may not choose the service."""
VALUES = st.one_of(
    st.sampled_from(["http", "local", "none", "http://evil.example/v1", "/etc/cron.d/x", "../x", "sk-1234", "8MB"]),
    st.sampled_from(["pinned", "poll", "json", "DEBUG"]),
    st.integers(0, 5000),
    st.floats(0, 1),
    st.just(["**/*.md"]),
)
URLS = ("http://user.example/v1", "http://other.example/v1")
KEYS = ("sk-of-the-user", "sk-of-the-root")


class Home:
    """A memory root, and a user with a settings file, an environment and a state directory of their own."""

    def __init__(self, top: Path) -> None:
        self.root, self.user_file = top / "vault", top / "settings.toml"
        self.root.mkdir()
        self.environment: dict[str, str] = {"XDG_STATE_HOME": str(top / "state")}

    def write(self, values: dict[str, Any], *, user: bool = False) -> None:
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        (self.user_file if user else self.root / ROOT_SETTINGS_FILE).write_text(text)

    def trust(self) -> None:
        trust.remember(self.root, (self.root / ROOT_SETTINGS_FILE).read_bytes(), self.environment)

    def load(self, **flags: object) -> Settings:
        return load({"memory.root": str(self.root), **flags}, environment=self.environment, user_file=self.user_file)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@contextmanager
def a_home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory() as directory:
        yield Home(Path(directory))


def test_every_setting_that_names_a_destination_is_the_users() -> None:
    of_user = {name for name, who in setters().items() if who.startswith("user")}
    assert of_user == DESTINATIONS | {"embedder.kind"}
    assert setters()["embedder.kind"] == "user, root: `local`, root: `none`"


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_no_content_of_a_roots_file_changes_where_anything_goes(values: dict[str, Any]) -> None:
    with a_home() as home:
        home.write({"embedder.kind": "http", "embedder.url": URLS[0], "embedder.model": "m"}, user=True)
        before = describe(home.load())
        home.write(values)
        try:
            after = describe(home.load())
        except SettingsError:
            return
        assert {name: after[name] for name in DESTINATIONS} == {name: before[name] for name in DESTINATIONS}
        assert after["embedder.kind"] == before["embedder.kind"] or after["embedder.kind"] in {"local", "none"}


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["root", "user file", "environment", "flags"]), max_size=3),
    st.lists(st.sampled_from(["root", "user file", "environment", "flags"]), max_size=3),
    st.data(),
)
def test_a_key_goes_only_to_an_address_of_its_own_source(keys: list[str], urls: list[str], data: st.DataObject) -> None:
    said: dict[str, dict[str, Any]] = {"root": {}, "user file": {}, "environment": {}, "flags": {}}
    for source in keys:
        said[source]["embedder.api_key"] = KEYS[source == "root"]
    for source in urls:
        said[source]["embedder.url"] = data.draw(st.sampled_from(URLS))
    with a_home() as home:
        home.write(said["root"])
        home.write({"embedder.kind": "http", "embedder.model": "m", **said["user file"]}, user=True)
        home.environment |= {f"EVEROS_{n.replace('.', '__').upper()}": v for n, v in said["environment"].items()}
        home.trust()
        try:
            embedder = home.load(**said["flags"]).embedder
        except SettingsError:
            return
        of_users = {said[source].get("embedder.url") for source in ("user file", "environment", "flags")}
        assert embedder.api_key != KEYS[0] or embedder.url in of_users


def test_a_cloned_root_that_redirects_key_and_text_is_refused_with_the_command(home: Home) -> None:
    home.write({"embedder.kind": "http", "embedder.url": "http://evil.example/v1", "embedder.model": "m"})
    with pytest.raises(
        SettingsError, match=r"embedder\.kind, embedder\.url, embedder\.model only when you trust it"
    ) as e:
        home.load()
    assert f"everos-engine --root {home.root} trust" in str(e.value)
    assert "evil" not in str(e.value)


def test_a_key_of_the_environment_is_not_sent_to_a_trusted_roots_address(home: Home) -> None:
    home.write({"embedder.kind": "http", "embedder.url": URLS[1], "embedder.model": "m"})
    home.trust()
    home.environment["EVEROS_EMBEDDER__API_KEY"] = KEYS[0]
    with pytest.raises(SettingsError, match=r"EVEROS_EMBEDDER__API_KEY: embedder\.api_key is not sent to the address"):
        home.load()
    home.environment["EVEROS_EMBEDDER__URL"] = URLS[1]
    assert home.load().embedder.api_key == KEYS[0]


def test_trust_ends_with_the_next_change_of_the_file(home: Home) -> None:
    home.write({"lancedb.history_file": "/elsewhere/history"})
    home.trust()
    assert home.load().lancedb.history_file == "/elsewhere/history"
    home.write({"lancedb.history_file": "/elsewhere/other"})
    with pytest.raises(SettingsError, match=r"lancedb\.history_file only when you trust it"):
        home.load()


def test_trust_of_one_root_is_not_trust_of_a_copy_of_it(home: Home, tmp_path: Path) -> None:
    home.write({"lancedb.history_file": "/elsewhere/history"})
    home.trust()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / ROOT_SETTINGS_FILE).write_bytes((home.root / ROOT_SETTINGS_FILE).read_bytes())
    home.root = copy
    with pytest.raises(SettingsError, match="only when you trust it"):
        home.load()


def test_trust_is_never_remembered_inside_the_root(home: Home) -> None:
    home.environment["XDG_STATE_HOME"] = str(home.root / "state")
    home.write({"lancedb.history_file": "/elsewhere/history"})
    with pytest.raises(SettingsError, match="lies inside the memory root"):
        home.trust()
    outside = dict(home.environment, XDG_STATE_HOME=str(home.root.parent / "state"))
    record = trust.remember(home.root, (home.root / ROOT_SETTINGS_FILE).read_bytes(), outside)
    planted = home.root / "state" / record.relative_to(home.root.parent / "state")
    planted.parent.mkdir(parents=True)
    planted.write_bytes(record.read_bytes())
    planted.chmod(0o600)
    with pytest.raises(SettingsError, match="only when you trust it"):
        home.load()


def test_a_record_that_others_may_write_counts_for_nothing(home: Home) -> None:
    home.write({"lancedb.history_file": "/elsewhere/history"})
    home.trust()
    (record,) = trust.directory(home.environment).iterdir()
    assert record.stat().st_mode & 0o777 == 0o600
    record.chmod(0o666)
    with pytest.raises(SettingsError, match="only when you trust it"):
        home.load()


def test_the_command_shows_trusts_and_takes_back(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", home.environment["XDG_STATE_HOME"])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home.root.parent / "config"))
    home.write({"lancedb.history_file": "/elsewhere/history", "embedder.api_key": "sk-secret"})
    root = os.fspath(home.root)
    assert main(["--root", root, "settings"]) == 2
    assert main(["--root", root, "trust", "--show"]) == 1
    told = capsys.readouterr()
    assert 'embedder.api_key = "********"' in told.out
    assert "trust --show" in told.err
    assert main(["--root", root, "trust"]) == 0
    assert main(["--root", root, "trust", "--show"]) == 0
    assert main(["--root", root, "settings"]) == 0
    home.write({"lancedb.history_file": "/elsewhere/other"})
    capsys.readouterr()
    assert main(["--root", root, "trust", "--show"]) == 1
    assert "it has changed since it was trusted" in capsys.readouterr().out
    assert main(["--root", root, "trust", "--remove"]) == 0
    assert main(["--root", root, "settings"]) == 2
    home.write({"max_file_bytes": 5})
    assert main(["--root", root, "trust"]) == 0
    assert "nothing in it that needs trust" in capsys.readouterr().out
    assert "sk-secret" not in told.out + told.err


SECRET = st.text("abcdefghij0123456789", min_size=12, max_size=20).map(lambda text: f"sEcReT{text}")


@settings(max_examples=40)
@given(SECRET, st.sampled_from(["user:{}@h.example/v1", "{}@h.example/v1", "h.example/v1?key={}", "h.example/#{}"]))
def test_a_secret_in_an_address_is_never_shown(secret: str, form: str) -> None:
    url = "https://" + form.format(secret)
    assert secret not in masked_url(url)
    assert "h.example" in masked_url(url)
    embedder = EmbedderSettings(kind="http", url=url, model="m", api_key=f"key-{secret}")
    known = dataclasses.replace(Settings(), embedder=embedder)
    assert secret not in repr(known) + json.dumps(describe(known))
    assert {secret, f"key-{secret}"} <= set(secrets_of(known))


@settings(max_examples=40)
@given(SECRET, st.sampled_from(["{}", "[{}]", "{{ a = {} }}", "[1, {}]", "{}\nx"]))
def test_no_error_of_the_settings_shows_a_key(secret: str, form: str) -> None:
    with a_home() as home:
        text = f"embedder.api_key = {form.format(json.dumps(secret))}\n"
        home.user_file.write_text(text)
        with pytest.raises(SettingsError) if form != "{}" else nullcontext() as caught:
            home.load()
        assert caught is None or secret not in str(caught.value)
