"""What the environment says of proxies and certificates, as a table, and calls that really go through a proxy."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_server import serving
from everos_engine.embed.http import open_http_embedder
from everos_engine.embed.proxies import certificates, proxy_for
from everos_engine.engine import open_engine, open_reader
from everos_engine.errors import BadText, SettingsError, Transient, Unavailable
from everos_engine.settings import EmbedderSettings, load
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import put

P = "http://proxy.example:3128"
ELSEWHERE = "http://embedder.example/v1"


@pytest.mark.parametrize(
    ("environment", "address", "expected"),
    [
        ({}, ("https", "a.example", None), None),
        ({"HTTPS_PROXY": P}, ("https", "a.example", None), P),
        ({"HTTPS_PROXY": P}, ("http", "a.example", None), None),
        ({"ALL_PROXY": P}, ("http", "a.example", None), P),
        ({"http_proxy": P, "HTTP_PROXY": "http://other:1"}, ("http", "a.example", None), P),
        ({"http_proxy": "", "HTTP_PROXY": P}, ("http", "a.example", None), None),
        ({"HTTP_PROXY": P, "REQUEST_METHOD": "GET"}, ("http", "a.example", None), None),
        ({"HTTP_PROXY": "proxy.example:3128"}, ("http", "a.example", None), P),
        ({"HTTP_PROXY": P + "/"}, ("http", "a.example", None), P),
        ({"ALL_PROXY": "socks://127.0.0.1:1080/"}, ("http", "a.example", None), "socks5://127.0.0.1:1080"),
        ({"ALL_PROXY": "socks5h://127.0.0.1"}, ("http", "a.example", None), "socks5h://127.0.0.1:1080"),
        ({"ALL_PROXY": "http://me:secret@p.example"}, ("http", "a.example", None), "http://me:secret@p.example"),
        ({"ALL_PROXY": P, "NO_PROXY": "*"}, ("http", "a.example", None), None),
        ({"ALL_PROXY": P, "NO_PROXY": "::1,fe80::/10"}, ("http", "a.example", None), P),
        ({"ALL_PROXY": P, "NO_PROXY": "::1,fe80::/10"}, ("http", "fe80::7", None), None),
        ({"ALL_PROXY": P, "NO_PROXY": "10.0.0.0/8"}, ("http", "10.1.2.3", None), None),
        ({"ALL_PROXY": P, "NO_PROXY": "10.0.0.0/8"}, ("http", "11.1.2.3", None), P),
        ({"ALL_PROXY": P, "NO_PROXY": "example"}, ("http", "a.example", None), None),
        ({"ALL_PROXY": P, "NO_PROXY": ".example , x"}, ("http", "a.example", None), None),
        ({"ALL_PROXY": P, "NO_PROXY": "*.example"}, ("http", "a.example", None), None),
        ({"ALL_PROXY": P, "NO_PROXY": "ample"}, ("http", "a.example", None), P),
        ({"ALL_PROXY": P, "NO_PROXY": "A.EXAMPLE:8080"}, ("http", "a.example", 8080), None),
        ({"ALL_PROXY": P, "NO_PROXY": "a.example:8080"}, ("http", "a.example", 8081), P),
        ({"ALL_PROXY": P, "no_proxy": "", "NO_PROXY": "*"}, ("http", "a.example", None), P),
    ],
)
def test_which_proxy_an_address_is_asked_through(
    environment: Mapping[str, str], address: tuple[str, str, int | None], expected: str | None
) -> None:
    found = proxy_for(*address, environment)
    assert (found and found.url) == expected


BAD = {
    "socks4": "socks4://127.0.0.1:1080",
    "ftp": "ftp://proxy.example",
    "no host": "http://",
    "a port that is none": "http://proxy.example:99999",
    "a port of letters": "http://me:secret@proxy.example:port",
    "half an address": "http://[::1",
    "a control character": "http://proxy\x07.example",
}


@pytest.mark.parametrize("name", BAD)
async def test_a_proxy_that_cannot_be_used_is_named_in_one_line(name: str) -> None:
    settings = EmbedderSettings(kind="http", url=ELSEWHERE, model="m")
    async with open_http_embedder(settings, environment={"ALL_PROXY": BAD[name]}) as embedder:
        with pytest.raises(SettingsError, match="ALL_PROXY") as caught:
            embedder.connect()
        assert str(caught.value).isprintable()
        assert "secret" not in str(caught.value)
        with pytest.raises(Unavailable, match="ALL_PROXY"):
            await embedder.embed(["heron"])


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_value_of_a_variable_breaks_anything_but_itself(proxy: str, exceptions: str) -> None:
    environment = {"ALL_PROXY": proxy, "NO_PROXY": exceptions}
    said = "ALL_PROXY"
    try:
        proxy_for("http", "a.example", None, environment)
    except SettingsError as error:
        said = str(error)
    assert "ALL_PROXY" in said
    assert said.isprintable()


def test_a_socks_proxy_without_its_package_names_the_extra() -> None:
    script = (
        "import sys; sys.modules['socksio'] = None\n"
        "from everos_engine.embed.proxies import proxy_for\n"
        "proxy_for('http', 'a.example', None, {'ALL_PROXY': 'socks5://me:secret@127.0.0.1:1080'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert "ALL_PROXY=socks5://127.0.0.1:1080 is a SOCKS proxy: install everos-engine[socks]" in done.stderr
    assert "secret" not in done.stderr.rpartition("SettingsError")[2]


def test_certificates_that_cannot_be_read_are_named_only_where_they_are_needed(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    for environment, variable in (
        ({"SSL_CERT_FILE": str(tmp_path / "missing.pem")}, "SSL_CERT_FILE"),
        ({"SSL_CERT_FILE": str(tmp_path / "no.pem")}, "SSL_CERT_FILE"),
        ({"SSL_CERT_FILE": str(tmp_path)}, "SSL_CERT_FILE"),
        ({"SSL_CERT_DIR": str(tmp_path / "missing")}, "SSL_CERT_DIR"),
        ({"SSL_CERT_FILE": "a\0b"}, "SSL_CERT_FILE"),
    ):
        with pytest.raises(SettingsError, match=variable):
            certificates(environment, needed=True)
        assert certificates(environment, needed=False) is not None
    assert certificates({}, needed=True) is None


BROKEN = {"ALL_PROXY": "socks4://127.0.0.1:9", "NO_PROXY": "::1,fe80::/10", "SSL_CERT_FILE": "/nowhere/at/all.pem"}


async def test_words_and_a_local_embedder_need_no_variable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BROKEN.items():
        monkeypatch.delenv(name.lower(), raising=False)
        monkeypatch.setenv(name, value)
    put(root, "a.md", "heron")
    flags = {"memory.root": str(root), "note.globs": ["*.md"]}
    local = load(flags, environment={}, user_file=root / "none")
    async with open_engine(local, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
    http = flags | {
        "embedder.kind": "http",
        "embedder.url": ELSEWHERE.replace("http:", "https:"),
        "embedder.model": "m",
    }
    served = load(http, environment={}, user_file=root / "none")
    async with open_reader(served) as reader:
        assert [hit.md_path for hit in await reader.search("heron", mode="fts")] == ["a.md"]
        assert [hit.md_path for hit in await reader.search("heron")] == ["a.md"]
        with pytest.raises(Unavailable, match="ALL_PROXY"):
            await reader.search("heron", mode="vector")
    with pytest.raises(SettingsError, match="ALL_PROXY"):
        async with open_engine(served):
            pass
    monkeypatch.delenv("ALL_PROXY")
    with pytest.raises(SettingsError, match="SSL_CERT_FILE"):
        async with open_engine(served):
            pass


@pytest.mark.parametrize("command", ["sync", "run", "search", "status"])
def test_commands_name_the_variable_in_one_line_or_do_not_need_it(command: str, root: Path) -> None:
    put(root, "a.md", "heron")
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | BROKEN
    environment |= {"EVEROS_ROOT": str(root), "EVEROS_EMBEDDER__KIND": "http"}
    environment |= {"EVEROS_EMBEDDER__URL": "https://embedder.example/v1", "EVEROS_EMBEDDER__MODEL": "m"}
    arguments = ["search", "heron", "--mode", "fts"] if command == "search" else [command]
    done = subprocess.run(
        [sys.executable, "-m", "everos_engine", *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert "Traceback" not in done.stderr
    if command in {"sync", "run"}:
        assert done.returncode == 2, done.stderr
        assert [line for line in done.stderr.splitlines() if "ALL_PROXY" in line]
    else:
        assert "PROXY" not in done.stderr


def _received(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := client.recv(count - len(data))):
        data += part
    return data


def _pump(one: socket.socket, other: socket.socket) -> None:
    try:
        while data := one.recv(65536):
            other.sendall(data)
    except OSError:
        pass
    finally:
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Socks:
    """A SOCKS5 proxy that sends every name to one place, and remembers the names."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                self.talk(client)

    def talk(self, client: socket.socket) -> None:
        _, count = _received(client, 2)
        _received(client, count)
        client.sendall(b"\x05\x00")
        kind = _received(client, 4)[3]
        assert kind == 3, "a name, which the proxy resolves"
        self.asked.append(_received(client, _received(client, 1)[0]).decode())
        _received(client, 2)
        with socket.create_connection(self.target) as server:
            client.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join(HANG_SECONDS)


@contextmanager
def socks(target: tuple[str, int]) -> Iterator[Socks]:
    proxy = Socks(target)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.listener.shutdown(socket.SHUT_RDWR)
        proxy.listener.close()
        thread.join(HANG_SECONDS)


@pytest.mark.parametrize("scheme", ["socks", "socks5", "socks5h"])
async def test_a_service_behind_a_socks_proxy_answers(scheme: str) -> None:
    pytest.importorskip("socksio")
    with serving() as service:
        host, _, port = service.url.removeprefix("http://").partition("/")[0].partition(":")
        with socks((host, int(port))) as proxy:
            settings = EmbedderSettings(kind="http", url=ELSEWHERE, model="m")
            environment = {"ALL_PROXY": f"{scheme}://127.0.0.1:{proxy.port}"}
            async with open_http_embedder(settings, environment=environment) as embedder:
                assert (await embedder.embed(["heron"])).shape == (1, 16)
            assert proxy.asked == ["embedder.example"]


async def test_a_service_behind_an_http_proxy_answers_and_gets_the_users_name() -> None:
    with serving() as service:
        address = service.url.removeprefix("http://").partition("/")[0]
        settings = EmbedderSettings(kind="http", url=ELSEWHERE, model="m")
        environment = {"http_proxy": f"http://me:word@{address}"}
        seen: list[tuple[str, str]] = []
        service.misbehave = lambda handler, *_: seen.append(
            (handler.path, handler.headers.get("Proxy-Authorization", ""))
        )
        async with open_http_embedder(settings, environment=environment) as embedder:
            with suppress(Transient, BadText):  # how the service answers is not what is asked here
                await embedder.embed(["heron"])
        assert seen[0] == (f"{ELSEWHERE}/embeddings", "Basic " + base64.b64encode(b"me:word").decode())
