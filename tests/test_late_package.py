"""A package whose `__init__.py` is put off behaves as if it was not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everos_engine.stores.late_package import late_package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with two submodules; its `__init__.py` imports one of them and counts how often it runs."""
    name = "late_sample"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(
        "import builtins\nbuiltins.late_runs = getattr(builtins, 'late_runs', 0) + 1\nfrom late_sample.one import ONE\nTWO = 2\n"
    )
    (tmp_path / name / "one.py").write_text("ONE = 1\n")
    (tmp_path / name / "other.py").write_text("OTHER = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.late_runs", 0, raising=False)
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def runs() -> int:
    import builtins

    return builtins.late_runs  # type: ignore[attr-defined]


def test_a_submodule_is_imported_without_the_package_s_init(package: str) -> None:
    with late_package(package):
        other = importlib.import_module(f"{package}.other")
    assert other.OTHER == 3
    assert runs() == 0


def test_the_first_use_of_a_name_runs_the_init_once(package: str) -> None:
    with late_package(package):
        module = importlib.import_module(package)
    assert (module.ONE, module.TWO, runs()) == (1, 2, 1)
    assert not hasattr(module, "THREE")
    assert runs() == 1


def test_from_imports_work(package: str) -> None:
    with late_package(package):
        importlib.import_module(package)
    from late_sample import TWO

    assert TWO == 2


def test_a_package_that_is_not_there_is_not_found(package: str) -> None:
    with late_package(f"{package}_missing"), pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package}_missing")


def test_nothing_is_left_on_the_import_path(package: str) -> None:
    before = list(sys.meta_path)
    with late_package(package), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert sys.meta_path == before


CLIENT = "lance_namespace_urllib3_client"


def test_lancedb_is_imported_without_its_remote_client_and_it_works_when_asked_for() -> None:
    code = f"""
import sys
import everos_engine.stores.lance
assert "{CLIENT}" in sys.modules, "LanceDB has another client now: see stores/lance.py"
assert not any(name.startswith("{CLIENT}.api.") for name in sys.modules)
import {CLIENT} as client
from {CLIENT} import TagApi
assert client.ApiClient and TagApi(client.ApiClient()).api_client
assert issubclass(client.ApiTypeError, client.OpenApiException)
print(sum(name.startswith("{CLIENT}.api.") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
