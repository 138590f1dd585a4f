"""An OpenAI-compatible embedding service over one long-lived HTTP client."""

from __future__ import annotations

import base64
import binascii
import email.utils
import ipaddress
import json
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import cast

import httpx
import numpy as np
import trio
from numpy.typing import NDArray

from everos_engine.embed.protocol import check, quoted
from everos_engine.embed.proxies import EXAMPLE, Proxy, certificates, proxy_for
from everos_engine.errors import (
    BadText,
    EngineError,
    Exhausted,
    SettingsError,
    Transient,
    Unavailable,
    Unexpected,
    exhausted,
    split_end,
)
from everos_engine.settings import MASK, EmbedderSettings, secrets_of

REFUSED = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
NO_BASE64 = {HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.NOT_IMPLEMENTED}
"""The statuses of servers that do not know ``encoding_format``."""
HINTS = {
    HTTPStatus.UNAUTHORIZED: "set embedder.api_key to a key the service takes",
    HTTPStatus.PAYMENT_REQUIRED: "the account has no credit",
    HTTPStatus.FORBIDDEN: "set embedder.api_key to a key that may use embedder.model",
    HTTPStatus.NOT_FOUND: "check embedder.url and embedder.model",
    HTTPStatus.METHOD_NOT_ALLOWED: "check embedder.url: it takes no POST to /embeddings",
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED: "check the proxy named by the environment",
    HTTPStatus.TOO_MANY_REQUESTS: "it asks for fewer calls: see embedder.calls_per_second",
}
MIN_ANSWER_BYTES = 64 << 10
MAX_BYTES_PER_VECTOR = 512 << 10
"""A vector of 8,192 numbers as text takes about 180 KiB. An answer larger than this is refused."""
MAX_QUOTED = 200


class HttpEmbedder:
    """Post to ``<url>/embeddings``.

    It asks for base64 and accepts lists of floats. It never follows a redirect with the key.
    """

    hedged = True

    def __init__(self, settings: EmbedderSettings, environment: Mapping[str, str]) -> None:
        self.model = f"http:{settings.model}"
        self.dimension = settings.dimension
        self.concurrency = settings.concurrency
        self.batch_size = settings.batch_size
        self._settings = settings
        self._environment = environment
        self._client: httpx.AsyncClient | None = None
        self._url = endpoint(settings.url)
        self._headers = _headers(settings.api_key)
        self._secrets = secrets_of(settings)
        self._base64: bool | None = None  # None until the service showed what it takes

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n, dimension), all finite and of one width.

        Raises BadText if the service refuses the texts, Unavailable if it refuses everything, else Transient.
        """
        status, headers, content = await self._post(texts, base64=self._base64 is not False)
        if self._base64 is None and status in NO_BASE64:
            status, headers, content = await self._post(texts, base64=False)
            if status == HTTPStatus.OK:
                self._base64 = False
        elif self._base64 is None and status == HTTPStatus.OK:
            self._base64 = True
        if status != HTTPStatus.OK:
            raise self._refusal(status, headers, content)
        return check(_vectors(content, len(texts)), count=len(texts), dimension=self.dimension)

    def connect(self) -> httpx.AsyncClient:
        """Return the client, which keeps its connections between calls. The first call makes it.

        Raises SettingsError if a variable of the environment names a proxy or certificates that cannot be used.
        """
        if self._client is None:
            url = httpx.URL(self._url)
            encrypted, proxy = url.scheme == "https", None
            if not is_loopback(self._url):
                proxy = proxy_for(url.scheme, url.host, url.port, self._environment)
            to_proxy = proxy is not None and proxy.url.startswith("https:")
            trusted = certificates(self._environment, needed=encrypted or to_proxy)
            many = self.concurrency
            # no time-outs of the client's own: a deadline of ours encloses each call
            self._client = httpx.AsyncClient(
                timeout=None,  # noqa: S113 - each call has a deadline of its own
                trust_env=False,
                verify=True if trusted is None else trusted,
                proxy=None if proxy is None else _proxy(proxy, trusted if to_proxy else None),
                limits=httpx.Limits(max_connections=2 * many + 2, max_keepalive_connections=many),
            )
        return self._client

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _post(self, texts: Sequence[str], *, base64: bool) -> tuple[int, httpx.Headers, bytes]:
        body: dict[str, object] = {
            "model": self._settings.model,
            "input": [text[: self._settings.max_characters] for text in texts],
        }
        if base64:
            body["encoding_format"] = "base64"
        try:
            with trio.fail_after(self._settings.deadline_seconds):
                request = self.connect().stream("POST", self._url, json=body, headers=self._headers)
                async with request as answer:
                    content = await _bounded(answer, MIN_ANSWER_BYTES + len(texts) * MAX_BYTES_PER_VECTOR)
                    return answer.status_code, answer.headers, content
        except trio.TooSlowError:
            raise Transient(
                f"the embedding service did not answer within {self._settings.deadline_seconds:g} s"
            ) from None
        except httpx.ConnectError as error:
            if exhausted(error):
                raise Exhausted(
                    f"no file descriptor for a connection to the embedding service: {self._safe(str(error))}"
                ) from None
            why = self._safe(str(error))
            raise Unavailable(
                f"the embedding service cannot be reached at {self._shown()} ({why}): start it, or set embedder.url"
            ) from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise Transient(
                f"the call to the embedding service broke off: {type(error).__name__}: {self._safe(str(error))}"
            ) from None
        except SettingsError as error:  # the engine asks at its start: a search does not end for it
            raise Unavailable(str(error)) from error
        except EngineError:
            raise
        except BaseException as error:
            end, rest = split_end(error)
            if rest is None:
                raise
            if end is not None:
                raise end from None
            if exhausted(rest):
                raise Exhausted(
                    f"no file descriptor for a call to the embedding service: {type(rest).__name__}"
                ) from None
            raise Unexpected(
                f"the call to the embedding service failed: {self._safe(quoted(rest))}", counts_as_retry=True
            ) from None

    def _refusal(self, status: int, headers: httpx.Headers, content: bytes) -> Transient | BadText:
        message = f"the embedding service answered HTTP {status}"
        said = self._safe(" ".join(content[: 4 * MAX_QUOTED].decode("utf-8", "replace").split()))[:MAX_QUOTED]
        quoted = f" ({said})" if said else ""
        if status in REFUSED:
            return BadText(f"{message} for this text{quoted}")
        wait = retry_after(headers.get("retry-after"))
        if status in HINTS:
            return Unavailable(f"{message}: {HINTS[HTTPStatus(status)]}{quoted}", retry_after_seconds=wait)
        if status < HTTPStatus.BAD_REQUEST:
            target = self._safe(headers.get("location", "nowhere"))[:MAX_QUOTED]
            return Unavailable(f"{message}, a redirect to {target}: set embedder.url to where the service is")
        if wait is not None:
            return Unavailable(f"{message}{quoted}", retry_after_seconds=wait)
        return Transient(f"{message}{quoted}")

    def _safe(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return "".join(char for char in text if char.isprintable())

    def _shown(self) -> str:
        url = httpx.URL(self._url)
        return f"{url.scheme}://{url.host}" + (f":{url.port}" if url.port else "")


def endpoint(url: str) -> str:
    """Return the address to post to, from ``embedder.url`` with or without ``/embeddings``. Raises SettingsError."""
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        why = _QUOTED.sub("", str(error)).strip(" :")  # what it quotes may be a part of a password
        raise SettingsError(f"embedder.url is no URL ({why}): write it like https://api.example.com/v1") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise SettingsError(
            "embedder.url has no host, or another scheme than http and https: write it like https://api.example.com/v1"
        )
    path = parsed.path.rstrip("/")
    return str(parsed.copy_with(path=path if path.endswith("/embeddings") else f"{path}/embeddings"))


def is_loopback(url: str) -> bool:
    """Return whether a URL names this machine. No proxy of the environment is used then."""
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@asynccontextmanager
async def open_http_embedder(
    settings: EmbedderSettings, *, environment: Mapping[str, str] | None = None
) -> AsyncIterator[HttpEmbedder]:
    """Yield the embedder for the length of the block. It connects when first used. Raises SettingsError."""
    embedder = HttpEmbedder(settings, os.environ if environment is None else environment)
    try:
        yield embedder
    finally:
        await embedder.aclose()


def _proxy(proxy: Proxy, trusted: ssl.SSLContext | None) -> httpx.Proxy:
    try:
        return httpx.Proxy(proxy.url, ssl_context=trusted)
    except (httpx.InvalidURL, ValueError) as error:
        raise SettingsError(
            f"{proxy.variable} is not a proxy that can be used ({type(error).__name__}): {EXAMPLE}"
        ) from None


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for (a number or an HTTP date), at most an hour.

    None if it is unusable.
    """
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None  # noqa: PLR0124 - NaN


def _headers(api_key: str) -> dict[str, str]:
    key = api_key.strip()
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise SettingsError("embedder.api_key has characters that no HTTP header may have: copy the key again")
    # compressed answers gain nothing on vectors, and could swell beyond every bound
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})


async def _bounded(answer: httpx.Response, most_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    with trio.CancelScope() as scope:  # leaving the loop early would leave the client's generators to the collector
        async for part in answer.aiter_bytes():
            size += len(part)
            if size > most_bytes:
                scope.cancel()
            else:
                parts.append(part)
    if size > most_bytes:
        raise Transient(f"the embedding service answered with more than {most_bytes} bytes")
    return b"".join(parts)


def _vectors(content: bytes, count: int) -> NDArray[np.float32]:
    """Return the vectors in the order of the texts. Raises Transient for a body that is not what was asked for."""
    try:
        data = cast("list[dict[str, object]]", json.loads(content)["data"])
        if not any("index" in item for item in data):
            rows = dict(enumerate(_vector(item["embedding"]) for item in data))
        else:
            rows = {int(cast("int", item["index"])): _vector(item["embedding"]) for item in data}
        if len(data) != count or rows.keys() != set(range(count)):
            raise Transient(
                f"the embedding service answered with {len(data)} vectors for {count} texts, indexes {sorted(rows)[:5]}"
            )
        return np.stack([rows[at] for at in range(count)])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, binascii.Error) as error:
        raise Transient(f"the embedding service answered with garbage: {type(error).__name__}") from None


def _vector(value: object) -> NDArray[np.float32]:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    with np.errstate(over="ignore"):  # infinite then, and refused with the other numbers that are not finite
        return np.asarray(value, dtype=np.float32)
