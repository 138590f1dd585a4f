from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from everos_engine.cli import main
from everos_engine.engine import open_engine
from everos_engine.settings import Settings
from everos_engine.system.descriptors import CLASSES
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "everos_engine", "--root", os.fspath(root), "fds", *words]


async def test_beside_a_running_engine_the_table_is_live(settings: Settings, root: Path) -> None:
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        while not engine.context.fds:
            await trio.sleep(0.01)
        shown = await trio.run_process(command(root), capture_stdout=True)
        told = json.loads((await trio.run_process(command(root, "--json"), capture_stdout=True)).stdout)
        status = await trio.run_process([*command(root)[:-1], "status"], capture_stdout=True)
    text = shown.stdout.decode()
    memory = told["fds"]["memory"]
    assert 0 < memory["soft_bytes"] < memory["ceiling_bytes"] == sum(memory["parts"].values())
    assert "memory ceiling: " in text
    assert all(f"{part} " in text.partition("memory ceiling: ")[2] for part in memory["parts"])
    assert " MiB resident of at most " in status.stdout.decode()
    assert f"engine: pid {os.getpid()}" in text
    assert all(f"  {name}" in text for name in CLASSES)
    assert "mode: reopen, cap 16 MiB, ceiling 64" in text
    assert "rotated 0 times" in text
    assert told["engine"] == {"state": "answers", "pid": os.getpid()}
    assert sum(told["fds"]["classes"].values()) > 10
    assert told["pressure"] == 1.0


async def test_it_watches_until_interrupted(settings: Settings, root: Path) -> None:
    words = command(root, "--watch", "--json")
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False), trio.open_nursery() as nursery:
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job may have it ignored
        run = partial(trio.run_process, words, stdout=subprocess.PIPE, check=False, preexec_fn=heard)
        process = await nursery.start(run)
        received = b""
        while received.count(b"\n") < 2:
            part = await process.stdout.receive_some()
            assert part, received
            received += part
        process.send_signal(signal.SIGINT)
    assert all(json.loads(line)["version"] == 1 for line in received.splitlines()[:2])
    assert process.returncode == 130


def test_without_an_engine_it_says_so_and_what_the_settings_imply(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--root", os.fspath(root), "fds"]) == 0
    text = capsys.readouterr().out
    assert "no engine is running here: start one with `everos-engine --root " in text
    assert "mode: reopen, cap 16 MiB, ceiling 64" in text
    assert main.main(["--root", os.fspath(root), "fds", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["engine"] == {"state": "absent", "pid": None}
    assert told["implied"]["refusal"] is None


def test_without_an_engine_it_says_why_none_would_start(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "everos-engine.toml").write_text(
        '[lancedb]\ndescriptor_mode = "pinned"\nindex_cache_size_bytes = "1GB"\ndescriptors_per_mebibyte = 10000\n'
    )
    assert main.main(["--root", os.fspath(root), "fds"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "it would not start: lancedb.index_cache_size_bytes=1073741824" in text
    assert "or use descriptor_mode=reopen, which pins none" in text


def test_an_engine_whose_ceiling_does_not_fit_is_refused_with_the_arithmetic(root: Path) -> None:
    run = f"{sys.executable} -m everos_engine run --root '{root}'"
    pinned = os.environ | {"EVEROS_LANCEDB__DESCRIPTOR_MODE": "pinned"}
    process = subprocess.run(
        ["bash", "-c", f"ulimit -n 256; exec {run}"],
        capture_output=True,
        text=True,
        check=False,
        env=pinned,
        timeout=HANG_SECONDS,
    )
    assert process.returncode == 2
    assert "index_cache_size_bytes=16777216 with lancedb.descriptor_mode=pinned needs up to 1824" in process.stderr
    assert "RLIMIT_NOFILE is 256: lower the cap to " in process.stderr


def test_a_limit_too_low_for_the_engine_itself_is_refused(root: Path) -> None:
    run = f"ulimit -n 50; exec {sys.executable} -m everos_engine run --root '{root}'"
    process = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    assert process.returncode == 2
    assert "RLIMIT_NOFILE is 50, and the engine itself needs up to 48 file descriptors" in process.stderr


def test_it_imports_neither_lancedb_nor_numpy(root: Path) -> None:
    script = (
        "import sys; from everos_engine.cli.main import main; main(sys.argv[1:]);"
        "sys.exit(' '.join({'lancedb', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "--root", os.fspath(root), "fds"], capture_output=True, text=True, check=False
    )
    assert process.stderr.strip() == ""
