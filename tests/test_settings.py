from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.errors import SettingsError
from everos_engine.settings import MemorySettings, load, table


@pytest.mark.parametrize(
    "line",
    [
        '[memory]\nroot = "a\\u0000b"',
        "[memory]\nroot = 5",
        f"worker_retry_backoff_seconds = {'9' * 400}",
        f'max_file_bytes = "{"9" * 400}.5"',
    ],
)
def test_a_value_no_setting_can_have_is_refused_with_the_file_that_says_it(line: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(line)
    with pytest.raises(SettingsError, match=str(file)):
        load(environment={}, user_file=file)


def test_a_word_where_a_number_belongs_is_refused_in_plain_words(tmp_path: Path) -> None:
    for name, wanted in (
        ("SCAN_INTERVAL_SECONDS", "must be a number"),
        ("WORKER_BATCH_SIZE", "must be a whole number"),
    ):
        with pytest.raises(SettingsError, match=f"EVEROS_{name}: {name.lower()}='many': {wanted}$"):
            load(environment={f"EVEROS_{name}": "many"}, user_file=tmp_path / "none.toml")


def test_a_root_cannot_be_moved_by_its_own_settings(tmp_path: Path) -> None:
    file = tmp_path / "everos-engine.toml"
    file.write_text('[memory]\nroot = "/elsewhere"')
    with pytest.raises(SettingsError, match="cannot move it"):
        load({"memory.root": str(tmp_path)}, environment={}, user_file=tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("EVEROS_EMBEDER__KIND", "EVEROS_EMBEDDER__KIND"),
        ("EVEROS_EMBEDDER_KIND", "EVEROS_EMBEDDER__KIND"),
        ("EVEROS_SCAN_INTERVAL", "EVEROS_SCAN_INTERVAL_SECONDS"),
        ("EVEROS_ROOTS", "EVEROS_ROOT"),
        ("EVEROS_LANCEDB__NOTHING_LIKE_IT", "everos-engine settings"),
    ],
)
def test_a_variable_that_is_almost_one_of_ours_is_refused(variable: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{variable}: .*{meant}"):
        load(environment={variable: "x"}, user_file=tmp_path / "none.toml")


def test_variables_of_other_programs_with_our_prefix_are_left_alone(tmp_path: Path) -> None:
    names = (
        "EMBEDDING__MODEL",
        "EMBEDDING__API_KEY",
        "LLM__MODEL",
        "PORT",
        "HOST",
        "LOG",
        "API__PORT",
        "MEMORY__TIMEZONE",
    )
    assert load(environment={f"EVEROS_{name}": "x" for name in names}, user_file=tmp_path / "none.toml")


@given(st.sampled_from([variable for _, variable, _, _ in table()]), st.data())
def test_one_slip_in_any_of_our_variables_is_refused_with_its_name(variable: str, data: st.DataObject) -> None:
    """Unless what comes out is one of ours, or has the prefix no more."""
    bare = variable.removeprefix("EVEROS_")
    at = data.draw(st.integers(0, len(bare) - 1))
    letter = data.draw(st.sampled_from(["", "X", bare[at] * 2, "_"]))
    slip = f"EVEROS_{bare[:at]}{letter}{bare[at + 1 :]}"
    if slip in {name for _, name, _, _ in table()}:
        return
    with pytest.raises(SettingsError, match=f"^{slip}: .*EVEROS_|^{slip}: .*everos-engine settings"):
        load(environment={slip: "x"}, user_file=Path(os.devnull))


def test_with_faults_nothing_is_raised_and_each_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('scan_interval = 5\nworker_batch_size = 0\n[embedder]\nkind = "http"\n')
    faults: list[str] = []
    found = load(environment={"EVEROS_BRAKE_RATO": "1"}, user_file=file, faults=faults)
    assert found.worker_batch_size == 50
    wanted = ["EVEROS_BRAKE_RATO", "'scan_interval'", "worker_batch_size=0", "embedder.kind=http"]
    assert [sum(name in fault for fault in faults) for name in wanted] == [1, 1, 1, 1]


def test_a_root_whose_path_is_not_utf8_is_refused_with_a_remedy() -> None:
    with pytest.raises(
        SettingsError, match=r"memory\.root='/nowhere/caf\\udce9': this path is not UTF-8.*rename the directory"
    ):
        MemorySettings(root=Path(os.fsdecode(b"/nowhere/caf\xe9")))
