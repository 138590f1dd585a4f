"""What an embedder is, and how its answers are checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from everos_engine.errors import SettingsError, Transient

PROBE_SENTENCE = "The quick brown fox remembers where the lazy dog sleeps."
"""Embedded once per start. Two models that give it the same vector are the same model."""
SAME_COSINE = 0.999
MAX_QUOTED = 200
"""Characters of a foreign error's text in a message."""


class Embedder(Protocol):
    """Turn texts into vectors. ``hedged`` says whether a slow call may be split and asked again."""

    @property
    def model(self) -> str:
        """Return the model's name."""

    @property
    def dimension(self) -> int:
        """Return the width of the vectors. It is 0 until it is known."""

    @property
    def concurrency(self) -> int:
        """Return the maximum of calls in flight."""

    @property
    def batch_size(self) -> int:
        """Return the maximum of texts in one call."""

    @property
    def hedged(self) -> bool:
        """Return whether a slow call may be split."""

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (n, dimension). Raises Transient, or BadText if the service refuses the texts."""


def check(answer: object, *, count: int, dimension: int) -> NDArray[np.float32]:
    """Return an embedder's answer as float32 of shape (count, dimension), all finite. ``dimension`` 0 accepts any.

    Lists and arrays of other numbers are converted. Raises Transient for anything else.
    """
    vectors = _numbers(answer)
    if vectors.ndim != 2 or vectors.shape[0] != count or vectors.shape[1] == 0:
        raise Transient(f"the embedder answered with shape {vectors.shape} for {count} texts")
    if dimension and vectors.shape[1] != dimension:
        raise Transient(
            f"the embedder answered with {vectors.shape[1]}-wide vectors, {dimension} are expected: "
            "set embedder.dimension and embedder.model to what the service serves"
        )
    if not np.isfinite(vectors).all():
        raise Transient("the embedder answered with numbers that are not finite")
    return vectors


def check_embedder(embedder: Embedder) -> None:
    """Raise SettingsError if an embedder lacks a usable property that is needed before its first call."""
    needs: dict[str, tuple[type, Callable[[object], bool], str]] = {
        "model": (str, bool, "a name that is not empty"),
        "dimension": (
            Integral,
            lambda value: cast("int", value) >= 0,
            "the width of its vectors, or 0 if that is not known yet",
        ),
        "concurrency": (Integral, lambda value: cast("int", value) >= 1, "the most calls at one time, at least 1"),
        "batch_size": (Integral, lambda value: cast("int", value) >= 1, "the most texts in one call, at least 1"),
        "hedged": (bool, lambda _: True, "whether a slow call may be split"),
        "embed": (object, callable, "an async method that takes texts"),
    }
    for name, (kind, fits, meaning) in needs.items():
        try:
            value = getattr(embedder, name)
        except Exception as error:
            raise SettingsError(
                f"the embedder {type(embedder).__name__} has no {name} ({type(error).__name__}): it must be {meaning}"
            ) from error
        if not isinstance(value, kind) or not fits(value):
            raise SettingsError(
                f"the embedder {type(embedder).__name__} has {name}={str(value)[:80]!r}: it must be {meaning}"
            )


def _numbers(answer: object) -> NDArray[np.float32]:
    """Return the answer as an array of float32. Raises Transient if it is not an array of numbers."""
    try:
        with np.errstate(over="ignore"):  # infinite then, and refused with the other numbers that are not finite
            found = np.asarray(answer)
            if found.dtype.kind not in "fiu":
                raise Transient(
                    f"the embedder answered with {type(answer).__name__} of {found.dtype}: numbers are expected"
                )
            return np.asarray(found, dtype=np.float32)
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        raise Transient(f"the embedder answered with {type(answer).__name__}, which is no array of numbers") from error


def similar(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> bool:
    """Return whether two probe vectors, of shape (dimension,), are of the same model: a cosine of at least 0.999."""
    if one.shape != other.shape:
        return False
    if np.array_equal(one, other):  # also of a model whose vectors have no length
        return True
    one, other = one.astype(np.float64), other.astype(np.float64)
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return norms > 0 and float(one @ other) / norms >= SAME_COSINE


def quoted(error: BaseException) -> str:
    """Return the type and the beginning of an error's text, on one line.

    It works for errors without a usable text too.
    """
    if isinstance(error, BaseExceptionGroup):
        return f"{type(error).__name__} of {'; '.join(map(quoted, error.exceptions))}"[: 2 * MAX_QUOTED]
    try:
        said = " ".join(str(error).split())[:MAX_QUOTED]
    except Exception:  # noqa: BLE001 - a foreign error, whose __str__ fails
        said = ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
