"""An OpenAI-compatible embedding service over one long-lived HTTP client."""

from __future__ import annotations

import base64
import binascii
import email.utils
import json
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import httpx
import numpy as np
import trio

from everos_engine.embed.protocol import check
from everos_engine.errors import BadText, Transient

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from everos_engine.settings import EmbedderSettings

REFUSED = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
HINTS = {
    HTTPStatus.UNAUTHORIZED: "check embedder.api_key",
    HTTPStatus.FORBIDDEN: "check embedder.api_key",
    HTTPStatus.NOT_FOUND: "check embedder.url and embedder.model",
}


class HttpEmbedder:
    """Posts to ``<url>/embeddings``; asks for base64 and takes float lists too."""

    hedged = True

    def __init__(self, settings: EmbedderSettings, client: httpx.AsyncClient) -> None:
        self.model = f"http:{settings.model}"
        self.dimension = settings.dimension
        self.concurrency = settings.concurrency
        self.batch_size = settings.batch_size
        self._settings = settings
        self._client = client
        self._base64 = True

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (n, dimension). Nothing but finite vectors of the known width ever leaves here."""
        answer = await self._post(texts, base64=self._base64)
        if answer.status_code == HTTPStatus.BAD_REQUEST and self._base64:
            plain = await self._post(texts, base64=False)
            if plain.status_code == HTTPStatus.OK:
                self._base64 = False
            answer = plain
        self._raise_for(answer)
        vectors = check(_vectors(answer.content, len(texts)), count=len(texts), dimension=self.dimension)
        self.dimension = int(vectors.shape[1])
        return vectors

    async def _post(self, texts: Sequence[str], *, base64: bool) -> httpx.Response:
        body = {"model": self._settings.model, "input": list(texts), "encoding_format": "base64" if base64 else "float"}
        headers = {"Authorization": f"Bearer {self._settings.api_key}"} if self._settings.api_key else {}
        url = self._settings.url.rstrip("/") + "/embeddings"
        try:
            with trio.fail_after(self._settings.deadline_seconds):
                return await self._client.post(url, json=body, headers=headers)
        except trio.TooSlowError:
            message = f"the embedding service did not answer within {self._settings.deadline_seconds:g} s"
            raise Transient(message) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"the embedding service cannot be reached: {type(error).__name__}: {error}"
            raise Transient(message) from None

    def _raise_for(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status == HTTPStatus.OK:
            return
        message = f"the embedding service answered HTTP {status}"
        if status in REFUSED:
            raise BadText(f"{message} for this text")
        hint = HINTS.get(HTTPStatus(status)) if status in {401, 403, 404} else None
        raise Transient(
            f"{message}: {hint}" if hint else message,
            retry_after_seconds=retry_after(answer.headers.get("retry-after")),
        )


def retry_after(header: str | None) -> float | None:
    """Seconds asked for by a Retry-After header (a number or an HTTP date), at most an hour; None without a usable one."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None  # noqa: PLR0124 - NaN


def _vectors(content: bytes, count: int) -> NDArray[np.float32]:
    """Vectors in the order of the texts. Raises Transient for a body that is not what was asked for."""
    try:
        data = cast("list[dict[str, object]]", json.loads(content)["data"])
        rows = {int(cast("int", item["index"])): _vector(item["embedding"]) for item in data}
        if len(data) != count or sorted(rows) != list(range(count)):
            message = f"the embedding service answered with {len(data)} vectors for {count} texts"
            raise Transient(message)
        return np.stack([rows[at] for at in range(count)])
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        message = f"the embedding service answered with garbage: {type(error).__name__}"
        raise Transient(message) from None


def _vector(value: object) -> NDArray[np.float32]:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    return np.asarray(value, dtype=np.float32)
