"""Each sampling parameter against a plain NumPy reference, and the device's decisions about finishing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.execution.state import Choice, Tallies, empty_state, empty_tallies, pack_choices, tally
from llmos.drivers.jax.sampling.sampling import RUN, adjust, choose, keep_likely, largest, sample, variant_of
from llmos.drivers.jax.sampling.truncation import kept
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.sdk.checks import BIAS_LIMIT
from llmos.drivers.sdk.messages import Sampling

VOCAB = 50
LOGITS = (np.random.default_rng(0).standard_normal((4, VOCAB)) * 3).astype(np.float32)


def choices(*sampling: Sampling) -> Choice:
    return Choice(*(jnp.asarray(field) for field in pack_choices(list(sampling))))


def state(*sampling: Sampling, length: int = 10, limit: int = 100, stop: int = -1) -> Any:
    """A batch in which every sequence is live."""
    rows = len(sampling)
    empty = empty_state(rows, 4, 0)
    return empty._replace(
        length=jnp.full(rows + 1, length),
        limit=jnp.full(rows + 1, limit),
        live=jnp.arange(rows + 1) < rows,
        stop=empty.stop.at[:, 1].set(stop),
        choice=choices(*sampling, Sampling()),
    )


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_kept(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """Which tokens top-k, then top-p, then min-p leave, by sorting."""
    order = np.argsort(-logits)
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1.0:
        mass = np.cumsum(softmax(logits[order]))
        order = order[: int(np.searchsorted(mass, sampling.top_p)) + 1]
    probability = softmax(logits[order])
    return set(order[probability >= sampling.min_p * probability.max()].tolist())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=500),
        Sampling(top_p=0.5),
        Sampling(top_p=0.99),
        Sampling(top_p=0.0),
        Sampling(min_p=0.1),
        Sampling(top_k=20, top_p=0.8, min_p=0.05),
        Sampling(),
    ],
)
def test_filters_leave_what_sorting_leaves(sampling: Sampling) -> None:
    choice = choices(*[sampling] * len(LOGITS))
    cut = kept(jnp.asarray(LOGITS), choice.top_k, choice.top_p)
    left = np.isfinite(keep_likely(cut, jnp.max(cut, axis=-1), choice))
    for row, logits in zip(left, LOGITS):
        assert set(np.flatnonzero(row).tolist()) == reference_kept(logits, sampling)


def test_rows_are_filtered_by_their_own_parameters() -> None:
    sampling = [Sampling(top_k=3), Sampling(top_p=0.6), Sampling(), Sampling(top_k=9, top_p=0.5)]
    choice = choices(*sampling)
    left = np.isfinite(kept(jnp.asarray(LOGITS), choice.top_k, choice.top_p))
    assert [set(np.flatnonzero(row).tolist()) for row in left] == [
        reference_kept(logits, s) for logits, s in zip(LOGITS, sampling)
    ]


def test_penalties_and_bias_follow_the_reference() -> None:
    sampling = Sampling(
        repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3, logit_bias={4: 2.0, 9: -50.0}
    )
    prompt, output = [4, 5, 5, 6], [7, 7, 5, 8]
    expected = LOGITS[0].astype(np.float64).copy()
    expected[4] += 2.0
    expected[9] -= 50.0
    for token in set(prompt + output):
        expected[token] *= 1.5 if expected[token] < 0 else 1 / 1.5
    for token in set(output):
        expected[token] -= 0.7 + 0.3 * output.count(token)
    known = np.zeros(32, np.int32)
    known[:8] = prompt + output
    ids = np.full(BIAS_LIMIT, VOCAB, np.int32)
    ids[:2] = [4, 9]
    bias = np.zeros(BIAS_LIMIT, np.float32)
    bias[:2] = [2.0, -50.0]
    tallies = tally(empty_tallies(1, VOCAB), *map(jnp.asarray, (0, known, 4, 8, ids, bias)))
    row = Tallies(*(field[:1] for field in tallies))
    np.testing.assert_allclose(
        adjust(jnp.asarray(LOGITS[:1]), choices(sampling), row)[0], expected, rtol=1e-5
    )


def test_sampled_frequencies_follow_the_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_k=6, top_p=0.95)
    count = 4000
    batch = state(*[Sampling(temperature=0.7, top_k=6, top_p=0.95, seed=i) for i in range(count)])
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[1]), (count, VOCAB))
    _, _, packed = sample("filtered", Columns(VOCAB), logits, jnp.arange(count), batch, None)
    heated = LOGITS[1] / 0.7
    kept = sorted(reference_kept(heated, sampling))
    expected = softmax(heated[kept])
    found = np.bincount(np.asarray(packed[0]), minlength=VOCAB)
    assert found[kept].sum() == count
    chi_square = ((found[kept] - count * expected) ** 2 / (count * expected)).sum()
    assert chi_square < 25


@pytest.mark.parametrize("variant", ["greedy", "plain", "filtered", "full"])
def test_temperature_zero_is_the_argmax_in_every_variant(variant: Any) -> None:
    tallies = empty_tallies(4, VOCAB) if variant == "full" else None
    _, _, packed = sample(
        variant, Columns(VOCAB), jnp.asarray(LOGITS), jnp.arange(4), state(*[Sampling()] * 4), tallies
    )
    assert packed[0].tolist() == LOGITS.argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [4 * RUN, 4 * RUN + 1])
def test_the_largest_is_the_first_of_equals_and_what_is_no_number(vocab: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, vocab)).astype(np.float32)
    x[1, [7, RUN + 1, vocab - 1]] = 9
    x[2, vocab - 2] = np.nan
    x[3] = -np.inf
    x[4, vocab - 1] = np.inf
    np.testing.assert_array_equal(largest(jnp.asarray(x)), np.argmax(x, axis=-1))


@pytest.mark.parametrize("variant", ["greedy", "plain", "filtered"])
def test_one_logit_of_many_that_is_no_number_makes_a_row_unsound(variant: Any) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 1 << 15)).astype(np.float32)
    logits[1, 777] = np.nan
    choice = choices(*[Sampling(temperature=0.7)] * 3)
    columns = Columns(logits.shape[1])
    tokens = choose(variant, jnp.asarray(logits), choice, jnp.arange(3), columns).tolist()
    assert [token < 0 for token in tokens] == [False, True, False]


def test_output_tokens_are_counted_for_live_rows_only() -> None:
    batch = state(*[Sampling(presence_penalty=1.0)] * 4)
    batch = batch._replace(live=batch.live.at[2].set(False))
    empty = empty_tallies(4, VOCAB)
    _, tallies, packed = sample("full", Columns(VOCAB), jnp.asarray(LOGITS), jnp.arange(4), batch, empty)
    assert tallies is not None
    assert packed[0].tolist()[2] == -1
    assert np.asarray(tallies.output).sum(1).tolist() == [1, 1, 0, 1, 0]


def test_finishing_is_decided_on_the_device() -> None:
    top = LOGITS.argmax(-1)
    batch = state(*[Sampling()] * 4, length=10, stop=int(top[0]))
    batch = batch._replace(limit=batch.limit.at[1].set(11), live=batch.live.at[3].set(False))
    logits = jnp.asarray(LOGITS).at[2, 5].set(np.nan)
    after, _, packed = sample("greedy", Columns(VOCAB), logits, jnp.arange(4), batch, None)
    assert packed.tolist() == [[int(top[0]), int(top[1]), -1, -1], [1, 2, 3, 0]]
    assert after.live.tolist() == [False] * 5
    assert after.length.tolist()[:4] == [11, 11, 10, 10]


@pytest.mark.parametrize(
    ("sampling", "variant"),
    [
        (Sampling(), "greedy"),
        (Sampling(top_k=5), "greedy"),
        (Sampling(temperature=1.0, min_p=0.1), "plain"),
        (Sampling(temperature=1.0, top_k=5), "filtered"),
        (Sampling(temperature=1.0, top_p=0.9), "filtered"),
        (Sampling(logit_bias={1: 1.0}), "full"),
        (Sampling(repetition_penalty=1.1), "full"),
    ],
)
def test_the_cheapest_variant_is_picked(sampling: Sampling, variant: str) -> None:
    assert variant_of(sampling) == variant
