"""Both ways to find the cut of top-k and top-p keep what sorting keeps, in every kind of row."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.sampling import truncation

VOCAB = 3000  # some blocks, of which the last is not full
ASKED = [
    (0, 0.9),
    (5, 1.0),
    (40, 0.5),
    (1, 0.95),
    (0, 0.0),
    (50, 0.99),
    (VOCAB + 5, 0.999),
    (3, 1.0),
    (0, 1.0),
]
TOP_K = jnp.asarray([k for k, _ in ASKED], jnp.int32)
TOP_P = jnp.asarray([p for _, p in ASKED], jnp.float32)


def rows(scale: float) -> np.ndarray:
    """One row of logits for each pair that is asked for."""
    return np.random.default_rng(7).normal(size=(len(ASKED), VOCAB)).astype(np.float32) * np.float32(scale)


def cuts(logits: np.ndarray, top_k: jnp.ndarray = TOP_K, top_p: jnp.ndarray = TOP_P) -> dict[str, np.ndarray]:
    """Who is kept, by each way."""
    x = jnp.asarray(logits)
    found = {
        "everywhere": truncation.everywhere(x, top_k, top_p),
        "on_gpu": truncation.on_gpu(x, top_k, top_p, interpret=True),
    }
    return {way: logits >= np.asarray(cut)[:, None] for way, cut in found.items()}


def by_sorting(row: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Who is kept of a row, in double precision; equals at a cut are kept together."""
    wide = row.astype(np.float64)
    least = np.sort(wide)[::-1][min(top_k, len(row)) - 1] if top_k else -np.inf
    if top_p < 1.0:
        weight = np.where(wide >= least, np.exp(wide - wide.max()), 0.0)
        order = np.argsort(-wide, kind="stable")
        share = np.cumsum(weight[order]) / weight.sum()
        least = max(least, wide[order][int(np.searchsorted(share, top_p))])
    return wide >= least


@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0, 2000.0])
def test_what_sorting_keeps_is_kept(scale: float) -> None:
    logits = rows(scale)
    for way, kept in cuts(logits).items():
        for row, number, share, mine in zip(logits, TOP_K.tolist(), TOP_P.tolist(), kept):
            expected = by_sorting(row, number, share)
            # At a cut by probability the sums of float32 may take one more or less.
            assert (mine != expected).sum() <= (share < 1.0), (way, number, share)


def test_equals_are_kept_together() -> None:
    logits = np.round(rows(3.0))
    for way, kept in cuts(logits).items():
        for row, mine in zip(logits, kept):
            assert set(row[mine]).isdisjoint(row[~mine]), way


def test_rows_without_an_order_keep_everything() -> None:
    logits = np.zeros((len(ASKED), VOCAB), np.float32)
    assert all(kept.all() for kept in cuts(logits).values())


def test_what_is_ruled_out_is_not_kept_for_its_number() -> None:
    logits = np.full((len(ASKED), VOCAB), -np.inf, np.float32)
    logits[:, 17] = 1.0
    wanted = jnp.full(len(ASKED), 0.9, jnp.float32)
    for way, kept in cuts(logits, TOP_K, wanted).items():
        assert [np.flatnonzero(row).tolist() for row in kept] == [[17]] * len(ASKED), way


def test_the_largest_is_always_kept() -> None:
    logits = rows(3.0)
    nothing = jnp.zeros(len(ASKED), jnp.float32)
    for way, kept in cuts(logits, jnp.zeros_like(TOP_K), nothing).items():
        assert [np.flatnonzero(row).tolist() for row in kept] == [[int(row.argmax())] for row in logits], way


def test_a_row_that_is_no_number_ends_the_search() -> None:
    logits = rows(3.0)
    logits[:, 5] = np.nan
    truncation.on_gpu(jnp.asarray(logits), TOP_K, TOP_P, interpret=True).block_until_ready()
