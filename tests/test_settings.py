from __future__ import annotations

from pathlib import Path

import pytest

from everos_engine.errors import SettingsError
from everos_engine.settings import load


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
