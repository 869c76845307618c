"""When guesses are verified: where they are measured to pay, and nowhere else."""

from __future__ import annotations

import pytest

from llmos.drivers.jax.speculation.speculation import AGAIN, PROBE, PROMISING, SAMPLES, Acceptance, Policy


def policy(plain: float = 1.0, verifying: float = 1.2, rate: float = 0.9) -> Policy:
    """A policy for one slot that has seen guesses of this quality and steps of these times."""
    made = Policy(guesses=4, sizes=[1, 4])
    made.begin(0)
    for _ in range(SAMPLES):
        made.timed(1, 0, plain)
        made.timed(1, 4, verifying)
    for _ in range(50):
        made.observe(0, 10, round(10 * rate))
    return made


def test_expected_tokens_are_those_of_a_run_of_right_guesses() -> None:
    assert Acceptance(0, 1).tokens(4) == 1
    assert Acceptance(1, 2).tokens(2) == pytest.approx(1 + 0.5 + 0.25)
    assert Acceptance(1, 1).tokens(4) == pytest.approx(5, abs=0.02)


def test_guesses_that_are_right_are_verified() -> None:
    assert policy().choose([0], 1) == 4


def test_guesses_that_are_wrong_are_not() -> None:
    assert policy(rate=0.0).choose([0], 1) == 0


def test_a_step_that_costs_more_than_its_guesses_bring_is_not_taken() -> None:
    assert policy(verifying=4.5).choose([0], 1) == 0


def test_a_batch_without_a_program_decodes_plainly() -> None:
    assert policy().choose([0], 16) == 0


def test_both_kinds_are_timed_before_they_are_compared() -> None:
    made = Policy(guesses=4, sizes=[1])
    made.begin(0)
    made.observe(0, 10, 10)
    chosen = []
    for _ in range(2 * SAMPLES):
        chosen.append(made.choose([0], 1))
        made.timed(1, chosen[-1], 9.0 if chosen[-1] else 1.0)
    assert chosen == [0] * SAMPLES + [4] * SAMPLES
    assert made.choose([0], 1) == 0


def test_guesses_are_not_tried_while_they_do_not_look_promising() -> None:
    made = Policy(guesses=4, sizes=[1])
    made.begin(0)
    for _ in range(SAMPLES):
        made.timed(1, 0, 1.0)
    made.observe(0, 100, 0)
    assert Acceptance(0, 100).tokens(4) < PROMISING
    assert made.choose([0], 1) == 0


def test_a_text_that_begins_to_repeat_is_noticed_by_plain_steps() -> None:
    made = policy(rate=0.0)
    steps = 0
    while not made.choose([0], 1):
        made.observe(0, 1, 1)
        steps += 1
    assert 0 < steps < 10


def test_what_is_not_in_use_is_timed_again() -> None:
    made = policy()
    chosen = []
    for _ in range(AGAIN + 10):
        chosen.append(made.choose([0], 1))
        made.timed(1, chosen[-1], 1.0)
    assert chosen.count(0) == SAMPLES
    slow = policy(verifying=4.9)
    chosen = []
    for _ in range(AGAIN + 10):
        chosen.append(slow.choose([0], 1))
        slow.timed(1, chosen[-1], 4.9 if chosen[-1] else 1.0)
    assert chosen.count(4) == SAMPLES


def test_a_kind_that_was_slow_while_others_compiled_gets_another_chance() -> None:
    made = policy(verifying=50.0)
    chosen = []
    for _ in range(AGAIN + 10):
        chosen.append(made.choose([0], 1))
        made.timed(1, chosen[-1], 1.2 if chosen[-1] else 1.0)
    assert chosen[0] == 0
    assert chosen[-1] == 4


def test_one_slow_step_changes_little() -> None:
    made = policy()
    made.timed(1, 4, 1000.0)
    assert made.choose([0], 1) == 4


def test_a_new_sequence_is_expected_to_be_like_those_before() -> None:
    made = policy()
    made.begin(1)
    assert made.choose([1], 1) == 4
    poor = policy(rate=0.0)
    poor.begin(1)
    assert poor.choose([1], 1) == 0


def test_the_sequences_of_a_batch_decide_together() -> None:
    made = policy()
    for kind in (0, 4):
        for _ in range(SAMPLES):
            made.timed(4, kind, 2.0 if kind else 1.0)
    for slot in (1, 2):
        made.begin(slot)
        made.observe(slot, 1000, 0)
    assert made.choose([0, 1], 4) == 4
    assert made.choose([0, 1, 2], 4) == 0


def test_guesses_that_only_trying_tells_about_are_tried_again_rarely() -> None:
    made = policy(rate=0.0)
    made.blind = True
    chosen = []
    for _ in range(3 * PROBE):
        chosen.append(made.choose([0], 1))
        made.timed(1, chosen[-1], 1.2 if chosen[-1] else 1.0)
    assert 2 * SAMPLES <= chosen.count(4) <= 3 * SAMPLES
    made.observe(0, 100, 100)
    assert made.choose([0], 1) == 4


def test_always_verifies_wherever_there_is_a_program() -> None:
    made = Policy(guesses=4, sizes=[1], always=True)
    assert made.choose([0], 1) == 4
    assert made.choose([0, 1], 4) == 0
