"""Tests of the test: a stress that cannot find a planted leak proves nothing."""

from __future__ import annotations

import pytest
from hypothesis import Phase
from hypothesis.stateful import run_state_machine_as_test

from everos_engine.system.slope import Learner
from fuzz.descriptors.machine import LIMIT, DescriptorMachine, limited, profile
from fuzz.descriptors.planted import KEPT, LEAKS

EXAMPLES = 60
"""Each leak shows within a few; a run stops at the first."""


@pytest.mark.parametrize(
    ("leak", "mode", "complaint"),
    [
        ("session-kept", "pinned", "outlive their Session|the law allows"),
        ("rotation-disabled", "pinned", "outlive their Session|the law allows"),
        ("plain-path-for-reopen", "reopen", "mode reopen pins"),
    ],
)
def test_the_state_machine_finds_a_planted_leak(leak: str, mode: str, complaint: str) -> None:
    machine = type("Planted", (DescriptorMachine,), {"index_class": LEAKS[leak], "only_mode": mode})
    try:
        with limited(LIMIT), pytest.raises(AssertionError, match=complaint):
            run_state_machine_as_test(machine, settings=profile(EXAMPLES, phases=(Phase.generate,)))
    finally:
        KEPT.clear()


def test_the_same_machine_without_a_leak_passes() -> None:
    with limited(LIMIT):
        run_state_machine_as_test(DescriptorMachine, settings=profile(3, phases=(Phase.generate,)))


def test_the_state_machine_finds_a_slope_that_is_learned_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Learner.see

    def see(learner: Learner, session: int, session_bytes: int, pinned: int) -> None:
        right(learner, session, session_bytes, -(-pinned // 8))

    monkeypatch.setattr(Learner, "see", see)
    machine = type("Planted", (DescriptorMachine,), {"only_mode": "pinned"})
    with limited(LIMIT), pytest.raises(AssertionError, match="by the learned slope"):
        run_state_machine_as_test(machine, settings=profile(EXAMPLES, phases=(Phase.generate,)))
