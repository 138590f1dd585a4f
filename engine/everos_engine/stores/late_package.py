"""Import a library without a package that it imports and that is never used."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


@contextmanager
def late_package(name: str) -> Iterator[None]:
    """Put off the ``__init__.py`` of the package ``name`` if it is imported in this block.

    Its submodules are imported as usual. The first use of a name that only ``__init__.py`` defines runs it, at any
    later time, so no user of the package sees a difference. (``importlib.util.LazyLoader`` runs it as soon as a
    submodule is imported.)
    """
    finder = _Finder(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def exec_module(self, module: ModuleType) -> None:
        def run_init(attribute: str) -> object:
            if attribute.startswith("__"):  # the import system asks for these
                raise AttributeError(attribute)
            vars(module).pop("__getattr__", None)
            self._loader.exec_module(module)
            return getattr(module, attribute)

        vars(module)["__getattr__"] = run_init
