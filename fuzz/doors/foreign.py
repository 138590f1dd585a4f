"""What each outside library can raise, enumerated from the library itself, and one error that nobody ever heard of."""

from __future__ import annotations

import builtins
import errno
import os
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

import apsw
import httpx
import lancedb.remote.errors
import pyarrow.lib
from watchfiles import _rust_notify

Make = Callable[[], BaseException]
WORDS = "the trap of this suite"


class NeverHeardOf(Exception):
    """On no list of anybody."""


class PanicException(BaseException):
    """As a Rust panic reaches Python."""


PASSED_ON = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What a door must let through: somebody means to end the task or the process."""


def of_sqlite() -> dict[str, Make]:
    return _all(_raised_by(apsw), {})


def of_lance() -> dict[str, Make]:
    own = [*_raised_by(lancedb.remote.errors, everywhere=True), *_raised_by(pyarrow.lib, everywhere=True)]
    plain = [RuntimeError, ValueError, OSError, KeyError, TypeError, NotImplementedError, MemoryError, TimeoutError]
    return _all(
        [*own, *plain], {"EMFILE in words": lambda: RuntimeError("lance error: Too many open files (os error 24)")}
    )


def of_watchfiles() -> dict[str, Make]:
    plain = [FileNotFoundError, PermissionError, OSError, RuntimeError, TypeError, ValueError]
    more = {
        "no watch left": lambda: OSError(errno.ENOSPC, "OS file watch limit reached"),
        "a name in no encoding": lambda: UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
    }
    return _all([*_raised_by(_rust_notify), *plain], more)


def of_the_system() -> dict[str, Make]:
    """One error for each errno that has a class of its own, and those of disks, mounts and limits."""
    codes = {
        code
        for code in errno.errorcode
        if type(OSError(code, "")) is not OSError or errno.errorcode[code] in {
            "EIO", "ESTALE", "ENOSPC", "ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE", "ENOMEM", "EROFS", "EDQUOT", "ENXIO",
            "EOVERFLOW", "ENOTCONN", "EINVAL", "ENODEV", "EUCLEAN",
        }
    }  # fmt: skip

    def failing(code: int) -> Make:
        return lambda: OSError(code, os.strerror(code))

    made = {errno.errorcode[code]: failing(code) for code in sorted(codes)}
    return made | {name.__name__: _maker(name) for name in (ValueError, MemoryError, OverflowError, NeverHeardOf)}


def of_httpx() -> dict[str, Make]:
    return _all([*_raised_by(httpx), ssl.SSLError, ssl.SSLCertVerificationError, OSError, ConnectionResetError], {})


def of_embedders() -> dict[str, Make]:
    """Whatever a program can raise: every builtin exception, and groups."""
    more: dict[str, Make] = {
        "a group": lambda: ExceptionGroup("two", [ValueError("one"), KeyError("two")]),
        "a group with a panic": lambda: BaseExceptionGroup("two", [PanicException("one"), ValueError("two")]),
    }
    return _all([one for one in _raised_by(builtins) if not issubclass(one, (*PASSED_ON, BaseExceptionGroup))], more)


def _all(classes: Iterable[type[BaseException]], more: Mapping[str, Make]) -> dict[str, Make]:
    named = {one.__name__: _maker(one) for one in (*classes, NeverHeardOf, PanicException)}
    return named | dict(more)


def _raised_by(module: ModuleType, *, everywhere: bool = False) -> list[type[BaseException]]:
    """Every error class of a module; ``everywhere`` leaves out those that it took from elsewhere."""
    found = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, BaseException)]
    return [one for one in dict.fromkeys(found) if not everywhere or one.__module__.partition(".")[0] != "builtins"]


def _maker(cls: type[BaseException]) -> Make:
    """How an error of this class is made, whatever its constructor wants."""
    ways: list[Make] = [
        lambda: cls(WORDS),
        lambda: cls(WORDS, request=httpx.Request("POST", "http://a.example")),  # type: ignore[call-arg]
        lambda: cls(WORDS, request=httpx.Request("POST", "http://a.example"), response=httpx.Response(500)),  # type: ignore[call-arg]
        lambda: cls(WORDS, "request", 500),
        lambda: cls("utf-8", "x", 0, 1, WORDS),
        lambda: cls("utf-8", b"x", 0, 1, WORDS),
        lambda: cls("x", 0, 1, WORDS),
        cls,
        lambda: cls.__new__(cls),
    ]
    for way in ways:
        try:
            way()
        except Exception:
            sys.exc_info()
            continue
        return way
    message = f"{cls} cannot be made"
    raise AssertionError(message)
