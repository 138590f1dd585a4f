"""Where vectors come from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everos_engine.embed.protocol import Embedder
    from everos_engine.settings import EmbedderSettings


@asynccontextmanager
async def open_embedder(settings: EmbedderSettings) -> AsyncIterator[Embedder | None]:
    """The embedder that the settings name; None for text search only."""
    if settings.kind == "none":
        yield None
    elif settings.kind == "local":
        from everos_engine.embed.local import LocalEmbedder  # noqa: PLC0415 - only what is used is loaded

        yield LocalEmbedder(batch_size=settings.batch_size)
    else:
        import httpx  # noqa: PLC0415 - only what is used is loaded

        from everos_engine.embed.http import HttpEmbedder  # noqa: PLC0415

        async with httpx.AsyncClient(timeout=None) as client:  # noqa: S113 - a deadline of ours encloses each call
            yield HttpEmbedder(settings, client)
