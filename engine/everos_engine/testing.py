"""Public parts for tests of programs that use the engine. They keep the same contracts as the real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import trio
from numpy.typing import NDArray

from everos_engine.errors import BadText, Transient


class FakeEmbedder:
    """An Embedder that answers immediately with a vector made from each text's hash, for ``open_engine(embedder=...)``.

    A text with HANG in it never returns, POISON is refused (BadText), FLAKY fails as Transient. Every call raises
    ``outage`` while it is set. ``calls`` are the texts of each call, ``peak`` the most parallel calls.
    Another ``model`` name is another model, which gives other vectors.
    """

    def __init__(self, *, model: str = "fake", dimension: int = 16, batch_size: int = 64, concurrency: int = 8) -> None:
        self.model = model
        self.dimension = dimension
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.hedged = True
        self.calls: list[tuple[str, ...]] = []
        self.outage: Transient | None = None
        self.peak = 0
        self._running = 0

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n, dimension), of unit length."""
        self.calls.append(tuple(texts))
        self._running += 1
        self.peak = max(self.peak, self._running)
        try:
            return await self._answer(texts)
        finally:
            self._running -= 1

    async def _answer(self, texts: Sequence[str]) -> NDArray[np.float32]:
        await trio.lowlevel.checkpoint()
        if self.outage is not None:
            raise self.outage
        if any("HANG" in text for text in texts):
            await trio.sleep_forever()
        if any("POISON" in text for text in texts):
            raise BadText("refused by the fake")
        if any("FLAKY" in text for text in texts):
            raise Transient("flaky")
        return np.stack([self.vector(text) for text in texts])

    def vector(self, text: str) -> NDArray[np.float32]:
        """Return the vector that this model gives ``text``, shape (dimension,)."""
        seed = int.from_bytes(hashlib.blake2b(f"{self.model}\0{text}".encode(), digest_size=8).digest(), "big")
        vector = np.random.default_rng(seed).standard_normal(self.dimension).astype(np.float32)
        return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)
