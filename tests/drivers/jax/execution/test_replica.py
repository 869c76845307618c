"""What a replica keeps on its devices between steps, with programs that only count what they are asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmos.drivers.jax.execution.ledger import Limits, Slot
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.execution.spec import SCRUB_PAGES
from llmos.drivers.jax.paging.pool import Own

LIMITS = Limits(slots=4, pages=200, page_tokens=8, max_context=64, chunk_tokens=16, vocab_size=100)


class Programs:
    """Places rows, and scrubs pages, into lists."""

    def __init__(self) -> None:
        self.spec = SimpleNamespace(room=None)
        self.placed: list[list[int]] = []
        self.scrubbed: list[list[int]] = []

    def place_rows(self, rows: np.ndarray) -> np.ndarray:
        self.placed.append(rows.tolist())
        return rows

    def get(self, key: tuple[str]) -> Any:
        assert key == ("scrub",)
        return self.scrub

    def scrub(self, caches: list[Any], pages: np.ndarray) -> list[Any]:
        self.scrubbed.append(pages.tolist())
        return [*caches, "scrubbed"]


@pytest.fixture
def programs() -> Programs:
    return Programs()


def made(programs: Any, pages: Own) -> Replica:
    return Replica(LIMITS, programs, [], pages, SimpleNamespace())  # type: ignore[arg-type]


def test_rows_are_placed_once_for_as_long_as_the_batch_stays_the_same(programs: Programs) -> None:
    replica = made(programs, Own([]))
    first = replica.row_index([2, 0], 4)
    assert replica.row_index([2, 0], 4) is first
    assert programs.placed == [[2, 0, 4, 4]]


def test_few_rows_are_kept(programs: Programs) -> None:
    replica = made(programs, Own([]))
    kept = 4 * LIMITS.slots + 16
    for size in range(1, kept + 2):
        replica.row_index([], size)
    replica.row_index([], kept + 1)
    replica.row_index([], 1)
    assert len(programs.placed) == kept + 2


def test_pages_of_failed_sequences_are_cleared_once_for_all_that_share_them(programs: Programs) -> None:
    pages = Own([])
    one, other = made(programs, pages), made(programs, pages)
    one.faulty = list(range(SCRUB_PAGES + 1))
    other.clean()
    other.clean()
    assert programs.scrubbed == [list(range(SCRUB_PAGES)), [SCRUB_PAGES] + [201] * (SCRUB_PAGES - 1)]
    assert one.caches == ["scrubbed"] * 2


def test_a_closed_replica_leaves_clean_pages_and_is_not_asked_again(programs: Programs) -> None:
    pages = Own([])
    one, other = made(programs, pages), made(programs, pages)
    one.faulty = [3]
    one.close()
    assert [part[0] for part in programs.scrubbed] == [3]
    one.faulty = [4]
    other.clean()
    assert len(programs.scrubbed) == 1


def test_a_reset_empties_the_slots_that_others_hold_on_to(programs: Programs) -> None:
    replica = made(programs, Own([]))
    ledger = replica.ledger
    ledger.slots[1] = Slot([1], 1, 5, "greedy", 0, 1)
    ledger.adapters = {"a": 1}
    replica.reset()
    assert ledger.slots == {}
    assert replica.ledger is ledger
    assert ledger.adapters == {"a": 1}
