"""Texts to vectors: the model's identity, the cache, and the calls that are still needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from everos_engine.embed.protocol import PROBE_SENTENCE, similar
from everos_engine.errors import EngineError, Transient
from everos_engine.loops.desk import now_milliseconds
from everos_engine.stores import embeddings
from everos_engine.stores.index import Model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from everos_engine.embed.batch import Batcher
    from everos_engine.embed.protocol import Embedder
    from everos_engine.stores.database import Database

NO_MODEL = Model("none", 0)


@dataclass(slots=True)
class Remembering:
    """An Embedder that keeps every answer in the cache before anyone sees it, so that a crash repeats one call at most."""

    inner: Embedder
    cache: Database
    model_number: int = 0

    @property
    def model(self) -> str:
        """The inner embedder's model."""
        return self.inner.model

    @property
    def dimension(self) -> int:
        """The inner embedder's width."""
        return self.inner.dimension

    @property
    def concurrency(self) -> int:
        """Most calls in flight."""
        return self.inner.concurrency

    @property
    def batch_size(self) -> int:
        """Most texts in a call."""
        return self.inner.batch_size

    @property
    def hedged(self) -> bool:
        """Whether a slow call may be split."""
        return self.inner.hedged

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (n, dimension)."""
        found = await self.inner.embed(texts)
        kept = dict(zip(texts, found, strict=True))
        await self.cache.awrite(
            lambda tx: embeddings.put(tx, self.model_number, kept, now_milliseconds=now_milliseconds())
        )
        return found


@dataclass(slots=True)
class Vectors:
    """Vectors by text; without an embedder there are none."""

    cache: Database
    embedder: Remembering | None
    batcher: Batcher | None
    _model: Model | None = None
    _lock: trio.Lock = field(default_factory=trio.Lock)

    async def model(self) -> Model:
        """Which model answers: told apart from every earlier one by the vector of a fixed sentence.

        Raises Transient while the embedder does not answer.
        """
        async with self._lock:
            if self._model is None:
                self._model = await self._identify()
            return self._model

    async def cached(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Text -> vector of those known."""
        if self.embedder is None or not texts:
            return {}
        await self.model()
        number = self.embedder.model_number
        return await self.cache.awrite(
            lambda tx: embeddings.get(tx, number, texts, now_milliseconds=now_milliseconds())
        )

    async def embed(self, texts: Sequence[str]) -> list[NDArray[np.float32] | EngineError]:
        """One outcome per text, in order."""
        if self.batcher is None:
            message = "there is no embedder"
            raise Transient(message)
        return await self.batcher.embed(texts)

    async def query(self, text: str) -> NDArray[np.float32]:
        """The vector of a search text, shape (dimension,); raises what the embedder says."""
        await self.model()
        known = await self.cached([text])
        if text in known:
            return known[text]
        (outcome,) = await self.embed([text])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    async def _identify(self) -> Model:
        if self.embedder is None:
            return NO_MODEL
        probe = (await self.embedder.inner.embed([PROBE_SENTENCE]))[0]
        name = self.embedder.model
        known = [
            earlier
            for earlier, known_name, known_probe in await self.cache.aread(embeddings.models)
            if known_name == name and known_probe.shape == probe.shape and similar(known_probe, probe)
        ]
        number = known[0] if known else await self.cache.awrite(lambda tx: embeddings.add_model(tx, name, probe))
        self.embedder.model_number = number
        return Model(f"{name}#{number}", int(probe.shape[0]))
