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
