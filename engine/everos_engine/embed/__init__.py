"""Embedders: protocol, local model, HTTP client, batcher and circuit breaker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from everos_engine.settings import EmbedderSettings

if TYPE_CHECKING:
    from everos_engine.embed.protocol import Embedder


@asynccontextmanager
async def open_embedder(settings: EmbedderSettings, *, connecting: bool = False) -> AsyncIterator[Embedder | None]:
    """Yield the embedder that the settings name, or None for text search only. Its imports wait until it is used.

    With ``connecting`` the environment's proxy and certificates are checked before the first call. Raises
    SettingsError.
    """
    if settings.kind == "none":
        yield None
    elif settings.kind == "local":
        from everos_engine.embed.local import LocalEmbedder

        yield LocalEmbedder(batch_size=settings.batch_size)
    else:
        from everos_engine.embed.http import open_http_embedder

        async with open_http_embedder(settings) as embedder:
            if connecting:
                embedder.connect()
            yield embedder
