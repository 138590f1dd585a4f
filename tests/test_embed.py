"""One contract for every embedder, and the HTTP one against every way a service can misbehave."""

from __future__ import annotations

import base64
import email.utils
import gzip
import json
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedding_server import Handler, Misbehaviour, Service, always, b64, reply, reserved_port, serving, vectors
from everos_engine.embed.http import HttpEmbedder, endpoint, is_loopback, open_http_embedder, retry_after
from everos_engine.embed.local import MAX_CHARACTERS, SLICE_CHARACTERS, SLICE_TEXTS, LocalEmbedder, slices
from everos_engine.embed.protocol import Embedder
from everos_engine.errors import BadText, EngineError, SettingsError, Transient, Unavailable
from everos_engine.settings import EmbedderSettings
from everos_engine.testing import FakeEmbedder

KEY = "sk-a-key-that-must-not-be-seen"
Open = Callable[[], Any]


def http_settings(url: str, **more: object) -> EmbedderSettings:
    return EmbedderSettings(kind="http", url=url, model="m", api_key=KEY, **more)  # type: ignore[arg-type]


@asynccontextmanager
async def fake() -> AsyncIterator[Embedder]:
    yield FakeEmbedder()


@asynccontextmanager
async def local() -> AsyncIterator[Embedder]:
    yield LocalEmbedder(batch_size=64)


@asynccontextmanager
async def http() -> AsyncIterator[Embedder]:
    with serving() as service:
        async with open_http_embedder(http_settings(service.url)) as embedder:
            yield embedder


@pytest.mark.parametrize("opened", [fake, local, http])
async def test_every_embedder_keeps_one_contract(opened: Open) -> None:
    texts = ["heron", "an otter sleeps", "", "heron", "日本語 🦦 ünï", "word " * 20_000, "line\nline\ttab\u2028end"]
    async with opened() as embedder:
        assert embedder.model
        assert embedder.concurrency >= 1
        assert embedder.batch_size >= 1
        found = await embedder.embed(texts)
        again = await embedder.embed(texts[::-1])
        alone = await embedder.embed(texts[:1])
        dimension = embedder.dimension or found.shape[1]
    assert found.shape == (len(texts), dimension)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.allclose(found, again[::-1], atol=1e-5)
    assert np.allclose(found[0], found[3], atol=1e-5)
    assert np.allclose(found[0], alone[0], atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-2)


class Sliced(LocalEmbedder):
    """Tells which threads its slices were worked on in, in order."""

    def __init__(self) -> None:
        super().__init__(batch_size=64)
        self.threads: list[int] = []

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.threads.append(threading.get_ident())
        return super()._encode(texts)


async def test_the_local_embedder_leaves_the_event_loop_free_and_stops_after_the_slice_it_is_at() -> None:
    embedder, texts = Sliced(), ["word " * 1600] * 64
    assert (await embedder.embed(["warm"])).shape == (1, 512)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(embedder.embed, texts)
        while len(embedder.threads) < 4:
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
        begun = len(embedder.threads)
    assert threading.get_ident() not in embedder.threads
    assert len(embedder.threads) <= begun + 1 < len(list(slices(texts)))


@given(st.lists(st.text(max_size=40) | st.integers(0, 30_000).map("x".__mul__), max_size=80))
def test_slices_keep_texts_in_order_and_stay_small(texts: list[str]) -> None:
    found = list(slices(texts))
    assert [text for part in found for text in part] == texts
    for part in found:
        assert 1 <= len(part) <= SLICE_TEXTS
        assert len(part) == 1 or sum(map(len, part)) <= SLICE_CHARACTERS
    assert MAX_CHARACTERS <= SLICE_CHARACTERS


@asynccontextmanager
async def talking(misbehave: Misbehaviour | None = None, **more: object) -> AsyncIterator[tuple[Service, HttpEmbedder]]:
    with serving() as service:
        service.misbehave = misbehave
        async with open_http_embedder(http_settings(service.url, **({"dimension": 16} | more))) as embedder:
            yield service, embedder


async def refused(misbehave: Misbehaviour, **more: object) -> Exception:
    async with talking(misbehave, **more) as (_, embedder):
        with pytest.raises((Transient, BadText)) as caught:
            await embedder.embed(["one", "two"])
    assert KEY not in str(caught.value)
    assert KEY not in repr(caught.value)
    return caught.value


def good() -> list[float]:
    return [0.5] * 16


def floats(number: float) -> list[float]:
    return [number] * 16


GARBAGE: dict[str, object] = {
    "no json": b"<html>gateway</html>",
    "half of a json": b'{"data": [{"index": 0, "embed',
    "deep json": b'{"data": ' + b"[" * 200_000,
    "bad utf-8": b'{"data": "\xff"}',
    "a list": [1],
    "null": None,
    "no data": {"object": "list"},
    "data is text": {"data": "xx"},
    "data holds text": {"data": ["x", "y"]},
    "no embedding": {"data": [{"index": 0}, {"index": 1}]},
    "too few": vectors(good()),
    "too many": vectors(good(), good(), good()),
    "none": vectors(),
    "duplicate indexes": vectors(good(), good(), indexes=[0, 0]),
    "indexes from one": vectors(good(), good(), indexes=[1, 2]),
    "negative indexes": vectors(good(), good(), indexes=[-1, 0]),
    "infinite index": b'{"data": [{"index": 1e999, "embedding": [1]}, {"index": 0, "embedding": [1]}]}',
    "NaN": json.dumps(vectors(good(), floats(float("nan")))).encode(),
    "infinity": json.dumps(vectors(good(), floats(float("inf")))).encode(),
    "beyond float32": vectors(good(), floats(1e300)),
    "beyond any float": vectors(good(), [10**400] * 16),
    "null in a vector": vectors(good(), [None] * 16),
    "text in a vector": vectors(good(), ["x"] * 16),
    "nested": vectors(good(), [good()]),
    "widths differ": vectors(good(), [0.5] * 15),
    "both too narrow": vectors([0.5] * 8, [0.5] * 8),
    "empty vectors": vectors([], []),
    "a number": vectors(1.0, 1.0),
    "truncated base64": vectors(b64(*good()), b64(*good())[:-5]),
    "base64 cut at a number": vectors(b64(*good()), b64(*good()[:-1])),
    "no base64": vectors(b64(*good()), "!!!!"),
    "NaN in base64": vectors(b64(*good()), b64(*floats(float("nan")))),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_an_answer_that_is_not_what_was_asked_for_is_refused_whole(name: str) -> None:
    error = await refused(always(200, GARBAGE[name]))
    assert isinstance(error, Transient)
    assert "embed" in str(error)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "embedder.api_key"),
        (402, "credit"),
        (403, "embedder.api_key"),
        (404, "embedder.url and embedder.model"),
        (405, "embedder.url"),
        (429, "calls_per_second"),
        (302, "set embedder.url"),
        (308, "set embedder.url"),
    ],
)
async def test_a_service_that_serves_nobody_is_unavailable_and_the_remedy_is_named(status: int, said: str) -> None:
    error = await refused(always(status, {"error": f"key {KEY} is not known"}, Location="http://elsewhere.example/v2"))
    assert isinstance(error, Unavailable)
    assert not error.counts_as_retry
    assert said in str(error)
    assert f"HTTP {status}" in str(error)
    if status < 400:
        assert "elsewhere.example" in str(error)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 418])
async def test_a_failing_service_is_transient_and_quoted(status: int) -> None:
    error = await refused(always(status, b"\x00\x07boom \xff" + b"x" * 10_000))
    assert type(error) is Transient
    assert "boom" in str(error)
    assert len(str(error)) < 400
    assert str(error).isprintable()


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_refused_text_is_told_from_a_refusing_service(status: int) -> None:
    error = await refused(always(status, {"error": "too long"}))
    assert isinstance(error, BadText)
    assert "too long" in str(error)


async def test_retry_after_is_honoured_in_seconds_and_as_a_date() -> None:
    error = await refused(always(429, Retry_After="7"))
    assert isinstance(error, Unavailable)
    assert error.retry_after_seconds == 7
    moment = email.utils.formatdate(time.time() + 100, usegmt=True)
    error = await refused(always(503, Retry_After=moment))
    assert isinstance(error, Unavailable)
    assert 80 < (error.retry_after_seconds or 0) <= 100


@given(st.text() | st.floats().map(str) | st.datetimes().map(email.utils.format_datetime))
def test_any_retry_after_is_a_bounded_time_or_none(header: str) -> None:
    found = retry_after(header)
    assert found is None or 0 <= found <= 3600


def reset(handler: Handler, _body: dict[str, Any]) -> bool:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    os.close(handler.connection.detach())
    return True


def half_a_body(handler: Handler, _body: dict[str, Any]) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data":')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def no_http(handler: Handler, _body: dict[str, Any]) -> bool:
    handler.wfile.write(b"SSH-2.0-nothing\r\n")
    handler.close_connection = True
    return True


@pytest.mark.parametrize("misbehave", [reset, half_a_body, no_http])
async def test_a_call_that_breaks_off_is_transient(misbehave: Misbehaviour) -> None:
    error = await refused(misbehave)
    assert type(error) is Transient
    assert "broke off" in str(error)


async def test_nobody_at_the_address_is_unavailable() -> None:
    with reserved_port() as port:
        async with open_http_embedder(http_settings(f"http://127.0.0.1:{port}/v1")) as embedder:
            with pytest.raises(Unavailable, match=r"cannot be reached at http://127\.0\.0\.1:\d+ .*embedder\.url"):
                await embedder.embed(["x"])


async def test_the_deadline_ends_a_call_that_hangs_or_drips() -> None:
    def drip(handler: Handler, _body: dict[str, Any]) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not handler.server.closing.wait(0.02):  # type: ignore[attr-defined]
            handler.wfile.write(b" ")
        return True

    def hang(handler: Handler, _body: dict[str, Any]) -> bool:
        return bool(handler.server.closing.wait())  # type: ignore[attr-defined]

    for misbehave in (drip, hang):
        error = await refused(misbehave, deadline_seconds=0.3)
        assert type(error) is Transient
        assert "0.3 s" in str(error)


async def test_a_huge_answer_is_cut_off_before_memory_holds_it() -> None:
    sent = 0

    def flood(handler: Handler, _body: dict[str, Any]) -> bool:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        while sent < 1 << 28:
            handler.wfile.write(b" " * 65536)
            sent += 65536
        return True

    error = await refused(flood)
    assert "more than" in str(error)
    assert sent < 1 << 26


async def test_a_compressed_answer_is_read() -> None:
    def zipped(handler: Handler, _body: dict[str, Any]) -> bool:
        body = json.dumps(vectors(good(), good())).encode()
        reply(handler, 200, gzip.compress(body), Content_Encoding="gzip")
        return True

    async with talking(zipped) as (service, embedder):
        assert (await embedder.embed(["one", "two"])).shape == (2, 16)
        assert service.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [400, 422, 501])
async def test_a_service_without_base64_is_asked_for_plain_numbers_from_then_on(status: int) -> None:
    def old(handler: Handler, body: dict[str, Any]) -> bool:
        if "encoding_format" in body:
            reply(handler, status, {"error": "unknown field"})
            return True
        return False

    async with talking(old) as (service, embedder):
        first = await embedder.embed(["one"])
        await embedder.embed(["two"])
        assert np.allclose(first, [service.model.vector("one")], atol=1e-6)
        assert ["encoding_format" in request for request in service.requests] == [True, False, False]


async def test_a_service_that_ignores_base64_and_one_that_numbers_nothing_are_understood() -> None:
    def unnumbered(handler: Handler, body: dict[str, Any]) -> bool:
        rows = [{"embedding": [float(number)] * 16} for number, _ in enumerate(body["input"])]
        reply(handler, 200, {"data": rows})
        return True

    async with talking() as (service, embedder):
        service.base64 = False
        assert np.allclose(await embedder.embed(["one"]), [service.model.vector("one")], atol=1e-6)
        service.misbehave = unnumbered
        assert (await embedder.embed(["a", "b", "c"]))[:, 0].tolist() == [0, 1, 2]


async def test_a_refused_text_costs_one_call_once_the_service_showed_that_it_knows_base64() -> None:
    async with talking() as (service, embedder):
        await embedder.embed(["one"])
        with pytest.raises(BadText):
            await embedder.embed(["POISON"])
        assert len(service.requests) == 2


async def test_one_client_keeps_its_connections_and_sends_the_key_only_where_it_belongs() -> None:
    async with talking() as (service, embedder):
        for number in range(20):
            await embedder.embed([f"text {number}"])
        assert service.connections == 1
        assert {headers["Authorization"] for headers in service.headers} == {f"Bearer {KEY}"}


async def test_long_texts_are_cut_for_the_service() -> None:
    async with talking(max_characters=10) as (service, embedder):
        await embedder.embed(["0123456789abc"])
        assert service.requests[0]["input"] == ["0123456789"]


async def test_the_key_is_never_logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    async with talking(always(401, {"error": KEY})) as (_, embedder):
        with pytest.raises(Unavailable):
            await embedder.embed(["x"])
    out, err = capfd.readouterr()
    assert KEY not in caplog.text + out + err


@pytest.mark.parametrize("status", [200, 302, 400, 401, 413, 429, 500])
async def test_no_error_quotes_a_password_or_a_token_of_the_address(status: int) -> None:
    password, token = "pass word/1", "sig%2Fna+ture"
    basic = base64.b64encode(f"me:{password}".encode()).decode()
    forms = [KEY, password, quote(password, safe=""), token, unquote(token), basic]
    answer = always(status, {"error": " ".join(forms)}, Location=f"http://x.example/?{token}&key={KEY}")
    with serving() as service:
        service.misbehave = answer
        url = service.url.replace("://", f"://me:{quote(password, safe='')}@") + f"?sig={token}"
        async with open_http_embedder(http_settings(url, deadline_seconds=5)) as embedder:
            with pytest.raises(EngineError) as caught:
                await embedder.embed(["x"])
    assert [form for form in forms if form in str(caught.value)] == []


def test_no_error_about_an_address_quotes_a_part_of_it() -> None:
    for wrong in ("http://me:hun/ter2@h:x/v1", "hunter2:hunter2@h/v1", "hunter2://h", "http://h:hunter2/v1"):
        with pytest.raises(SettingsError, match=r"embedder\.url") as caught:
            endpoint(wrong)
        assert "hun" not in str(caught.value)
        assert "ter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-\n", " sk", "sk\x00y", "schlüssel", "two words"])
async def test_a_key_no_header_may_have_is_refused_without_being_shown(key: str) -> None:
    settings = EmbedderSettings(kind="http", url="http://127.0.0.1:1", model="m", api_key=key)
    if key.strip() == "sk-" or key.strip() == "sk":
        async with open_http_embedder(settings) as embedder:
            assert embedder.model == "http:m"
        return
    with pytest.raises(SettingsError, match=r"embedder\.api_key") as caught:
        async with open_http_embedder(settings):
            pass
    assert key not in str(caught.value)


def test_the_address_is_taken_with_and_without_its_last_part() -> None:
    assert endpoint("https://h/v1") == endpoint("https://h/v1/") == endpoint(" https://h/v1/embeddings ")
    assert endpoint("http://h:8080") == "http://h:8080/embeddings"
    assert endpoint("https://h/v1/embeddings?api-version=2") == "https://h/v1/embeddings?api-version=2"
    for wrong in ("h/v1", "ftp://h", "localhost:11434/v1", "", "http://"):
        with pytest.raises(SettingsError, match=r"embedder\.url"):
            endpoint(wrong)


def test_loopback_is_recognised_by_address_and_name() -> None:
    assert all(map(is_loopback, ["http://127.0.0.1:1", "http://[::1]/", "http://localhost:8", "http://127.9.9.9"]))
    assert not any(map(is_loopback, ["http://example.com", "http://10.0.0.1", "http://localhost.example.com"]))


async def test_no_proxy_of_the_environment_stands_before_a_service_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    async with talking() as (_, embedder):
        assert (await embedder.embed(["x"])).shape == (1, 16)


async def test_a_width_nobody_set_is_that_of_the_answer() -> None:
    async with talking(dimension=0) as (_, embedder):
        assert embedder.dimension == 0
        assert (await embedder.embed(["x"])).shape == (1, 16)
