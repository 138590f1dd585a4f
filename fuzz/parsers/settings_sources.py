"""Settings from hostile sources: a Settings or a SettingsError that names the source, never anything else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from everos_engine import settings as module
from everos_engine.errors import SettingsError
from everos_engine.settings import Settings, describe, load
from fuzz.scratch import SCRATCH

TABLE = module.table()
NAMES = st.sampled_from([name for name, *_ in TABLE]) | st.text(max_size=10)
VARIABLES = [variable for _, variable, *_ in TABLE] + ["EVEROS_ROOT", "EVEROS_UNKNOWN", "XDG_CONFIG_HOME"]
WORDS = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"[-+]?[0-9]{0,400}(\.[0-9]{0,3})?(e[0-9]{1,4})? ?(B|KB|MB|GiB|TB)?", fullmatch=True),
    st.sampled_from(
        ["true", "no", "1", "0", "-1", "nan", "inf", "1e400", "1_000", "٣", "~", "~x", "auto", "http", "none", "", " "]
    ),
)
TOML = st.one_of(
    st.booleans().map(lambda value: str(value).lower()),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12).map(json.dumps),
    st.sampled_from(
        ["1979-05-27", "[]", "[1, 2]", '["a", "b"]', "{a = 1}", "inf", "nan", '"8MB"', "9" * 400, '"a\\u0000b"']
    ),
)


def answer(environment: dict[str, str], text: str | bytes) -> Settings | None:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        file = Path(directory) / "settings.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            settings = load(environment=environment, user_file=file)
        except SettingsError:
            return None
    json.dumps(describe(settings))
    assert settings.root.is_absolute()
    return settings


@given(st.dictionaries(st.sampled_from(VARIABLES), WORDS.filter(lambda word: "\0" not in word), max_size=4))
def test_an_environment_is_read_or_refused(environment: dict[str, str]) -> None:
    answer(environment, "")


@given(st.lists(st.tuples(NAMES, TOML), max_size=4))
@example([("memory.root", '"a\\u0000b"')])
@example([("worker_retry_backoff_seconds", "9" * 400)])
@example([("max_file_bytes", f'"{"9" * 400}.0"')])
def test_a_settings_file_is_read_or_refused(pairs: list[tuple[str, str]]) -> None:
    answer({}, "\n".join(f"{name} = {value}" for name, value in pairs))


@given(st.binary(max_size=80))
def test_any_bytes_as_a_settings_file_are_refused_or_say_nothing(data: bytes) -> None:
    answer({}, data)


@given(st.integers(0, 2**62), st.sampled_from(["", "B", " KB", "kib", "MB", " GiB"]))
def test_a_size_is_what_it_says(number: int, unit: str) -> None:
    factor = {"": 0, "B": 0, "K": 1, "M": 2, "G": 3}[unit.strip()[:1].upper()]
    assert abs(module.parse_size(f"{number}{unit}") - number * 1024**factor) <= number * 1024**factor * 1e-15
