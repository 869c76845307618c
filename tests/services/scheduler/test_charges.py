"""What was used of the tokens per minute is still used when the scheduler is started anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.services.scheduler import charges
from llmos.services.scheduler.charges import FILE, Charges
from llmos.services.scheduler.limits import RateLimits


def start(run: Path, now: float) -> RateLimits:
    """A scheduler that begins where the one before was killed: nothing is closed."""
    kept = Charges(run)
    return RateLimits(kept.read(now), kept.note)


def test_a_bucket_goes_on_filling_from_where_it_was(tmp_path: Path) -> None:
    start(tmp_path, 0.0).take("a", 600, 600, 0.0)
    later = start(tmp_path, 5.0)
    assert later.wait("a", 600, 100, 5.0) == pytest.approx(5.0)
    assert later.wait("b", 600, 600, 5.0) == 0.0


def test_what_was_given_back_is_known_too(tmp_path: Path) -> None:
    rates = start(tmp_path, 0.0)
    rates.take("a", 600, 600, 0.0)
    rates.give_back("a", 200)
    assert start(tmp_path, 0.0).wait("a", 600, 200, 0.0) == 0.0


def test_the_file_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charges, "SPARE", 10)
    rates = start(tmp_path, 0.0)
    for _ in range(200):
        rates.take("a", 600, 1, 0.0)
    file = tmp_path / FILE
    assert len(file.read_bytes().splitlines()) <= 14
    assert file.stat().st_mode & 0o777 == 0o600
    assert start(tmp_path, 0.0).wait("a", 600, 600, 0.0) == pytest.approx(20.0)


def test_what_is_cut_off_or_of_another_boot_is_passed_over(tmp_path: Path) -> None:
    start(tmp_path, 0.0).take("a", 600, 600, 0.0)
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'["late", 10.0, 0.0, 1e9]\n["a", 10.0')
    rates = start(tmp_path, 0.0)
    assert rates.wait("a", 600, 100, 0.0) == pytest.approx(10.0)
    assert rates.wait("late", 600, 600, 0.0) == 0.0
