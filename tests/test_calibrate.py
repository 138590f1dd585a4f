from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from everos_engine.calibrate import experiment as calibrate_module
from everos_engine.calibrate.benchmark_run import Plan, run
from everos_engine.calibrate.experiment import MIB, UNBOUNDED, Line, as_text, offer, shape_of, slope_of
from everos_engine.calibrate.experiment import calibrate as run_calibration
from everos_engine.cli.main import main
from everos_engine.errors import EngineError, Fatal
from everos_engine.settings import LanceDBSettings, Settings, load
from everos_engine.system.ceiling import cap_of
from everos_engine.text.kinds import KINDS
from writer import put

WORDS = tuple(f"word{number}" for number in range(2000))
EPISODE = (
    "<!-- entry:ep_{0:08d} -->\n## ep\n\n**timestamp**: 2025-02-27T09:25:00+00:00\n\n### Subject\nred heron\n\n"
    "### Content\nthe heron of day {0}\n<!-- /entry:ep_{0:08d} -->\n"
)


def line(mode: str, cap: int | None, pinned: int, ceiling: int | None, *, safe: int | None = 1024) -> Line:
    return Line(mode, cap, pinned, ceiling, False, 2.0, 4.0, 3.0, MIB, safe, (pinned,), False)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["pinned", "reopen"])
async def test_a_trial_pins_descriptors_on_the_plain_path_alone(tmp_path: Path, mode: str) -> None:
    columns = len(KINDS["episode"].fts_columns)
    plan = Plan(mode, 16 * MIB, 4, 100, 5, 8, WORDS, [(60,) * columns])  # type: ignore[arg-type]
    trial = await run(plan, tmp_path / "lancedb")
    assert (trial.pinned > 0) is (mode == "pinned")
    assert trial.pinned <= (4 * plan.cycles - 1) * columns  # the law
    assert trial.peak >= trial.base + trial.pinned
    assert (len(trial.per_cycle), len(trial.query_milliseconds), trial.exhausted) == (4, 5, False)


def test_the_slope_is_of_caps_that_were_reached_where_evictions_made_the_count_fall() -> None:
    counts = {2 * MIB: [10, 60, 40, 50], 8 * MIB: [10, 60, 120], UNBOUNDED: [10, 60, 140]}
    assert slope_of(counts, otherwise=99.0) == 30.0
    assert slope_of({8 * MIB: [10, 60, 120]}, otherwise=99.0) == 99.0


def test_the_offer_is_reopen_and_for_pinned_the_largest_cap_that_fits_twice() -> None:
    lines = [line("pinned", 2 * MIB, 60, 100), line("pinned", 8 * MIB, 240, 290), line("pinned", None, 500, None)]
    reopen = line("reopen", 8 * MIB, 0, 48)
    found = offer([*lines, reopen], slope=30.0, limit=300)
    assert found["lancedb.descriptor_mode"] == "reopen"
    assert found["pinned.index_cache_size_bytes"] == 2 * MIB
    broken = offer([*lines, line("reopen", 8 * MIB, 200, 250)], slope=30.0, limit=300)
    assert (broken["lancedb.descriptor_mode"], broken["lancedb.index_cache_size_bytes"]) == ("pinned", 2 * MIB)


@pytest.mark.parametrize("limit", [256, 400, 1024, 4096])
def test_what_is_offered_for_pinned_is_taken_at_the_next_start(limit: int) -> None:
    lines = [line("pinned", mib * MIB, 10, 50) for mib in (1, 2, 4, 8, 16)]
    found = offer([*lines, line("reopen", 16 * MIB, 0, 48)], slope=37.0, limit=limit)
    settings = LanceDBSettings(
        descriptor_mode="pinned",
        index_cache_size_bytes=int(str(found["pinned.index_cache_size_bytes"])),
        descriptors_per_mebibyte=float(str(found["lancedb.descriptors_per_mebibyte"])),
    )
    assert cap_of(settings, limit=limit) == found["pinned.index_cache_size_bytes"]


def test_the_table_is_the_runbooks() -> None:
    text = as_text([line("pinned", 4 * MIB, 52, 100, safe=256), line("pinned", None, 500, None, safe=None)])
    assert "| pinned | 4 MiB     | 100                | 2.0 ms | 4.0 ms | 3.0 ms | 256" in text[2]
    assert "grows for ever" in text[3]
    assert "never" in text[3]


def test_the_shape_is_the_roots_own_where_it_has_enough_episodes(settings: Settings, root: Path) -> None:
    assert "made-up" in shape_of(settings).source
    front = "---\ntype: episode_daily\nuser_id: u1\n---\n"
    put(root, "users/u1/episodes/e.md", front + "".join(EPISODE.format(day) for day in range(25)))
    shape = shape_of(settings)
    assert shape.source.startswith("25 episodes of ")
    assert {lengths[:2] for lengths in shape.lengths} == {(2, 5)}
    assert "heron" in shape.words


def test_the_command_prints_the_table_and_writes_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"QUICK_CAPS": (MIB,), "QUICK_CYCLES": 2, "QUICK_QUERIES": 2, "ROWS": 10}.items():
        monkeypatch.setattr(calibrate_module, name, value)
    output = tmp_path / "out"
    assert main(["--root", str(tmp_path / "none"), "fds", "calibrate", "--quick", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "| pinned | unbounded | grows for ever" in said
    assert 'descriptor_mode = "pinned"' in said
    facts = json.loads((output / "calibration.json").read_text())
    assert facts["offer"]["lancedb.descriptor_mode"] == "reopen"
    assert [found["mode"] for found in facts["lines"]] == ["pinned", "pinned", "reopen"]
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (output / "calibration.png").exists() is drawn
    assert drawn or "pip install 'everos-engine[plots]'" in said


def test_a_trial_that_dies_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Fatal, match="a trial failed with status 1"):
        run_calibration(load({"memory.root": str(tmp_path)}, environment={}), quick=True, output=tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(EngineError, match="another folder with --output"):
        calibrate_module._write({}, [], in_the_way / "below")
