"""The native kernel chooses the tokens that XLA and sorting choose, and keeps the distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.jax.execution.state import Choice, pack_choices
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.sampling import sampling
from llmos.drivers.jax.sampling.noise import noise
from llmos.drivers.jax.sampling.sampling import Variant
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.sdk.messages import Sampling

ROWS = 8
VARIANTS: tuple[Variant, ...] = ("greedy", "plain", "filtered", "full")
LAST_SEED = 2**32 - 1


@pytest.fixture(autouse=True)
def compiled(native_kernels: bool) -> None:
    if not native_kernels:
        pytest.skip(kernels.state())


def traced(native: bool, variant: Variant) -> jax.stages.Wrapped:
    def choose(logits: jax.Array, choice: Choice, position: jax.Array) -> jax.Array:
        with kernels.use(native):
            return sampling.choose(variant, logits, choice, position, Columns(logits.shape[1]))

    return jax.jit(choose)


WAYS = {native: {variant: traced(native, variant) for variant in VARIANTS} for native in (True, False)}


def tokens(
    native: bool, logits: np.ndarray, asked: list[Sampling], position: Any = 7, variant: Variant = "filtered"
) -> np.ndarray:
    """What rows choose that ask for one thing each."""
    choice = Choice(*(jnp.asarray(field) for field in pack_choices(asked)))
    positions = jnp.broadcast_to(jnp.asarray(position, jnp.int32), len(asked))
    return np.asarray(WAYS[native][variant](jnp.asarray(logits, jnp.float32), choice, positions))


def acceptable(row: np.ndarray, asked: Sampling, position: int) -> set[int]:
    """The tokens that may be chosen in exact arithmetic, or where sums of float32 are off by some bits."""
    with np.errstate(over="ignore", divide="ignore"):
        heated, ratio = (
            (row / np.float32(asked.temperature)).astype(np.float64),
            np.log(np.float64(asked.min_p)),
        )
    order = np.sort(heated)[::-1]
    found = set()
    for slack in (-1e-5, 1e-5):
        least = order[min(asked.top_k, len(row)) - 1] if asked.top_k else -np.inf
        share = np.where(order >= least, np.exp(order - order[0]), 0)
        share /= share.sum()
        if asked.top_p < 1:
            before = np.cumsum(share) - share
            least = max(least, order[np.flatnonzero(before <= max(0.0, asked.top_p + slack))[-1]])
        least = max(least, order[0] + ratio + slack)
        gumbel = np.asarray(noise(jnp.asarray([asked.seed], jnp.uint32), jnp.asarray([position]), len(row)))
        noisy = np.where(heated >= least, heated + gumbel[0], -np.inf)
        found |= set(np.flatnonzero(noisy >= noisy.max() - 1e-5 - 1e-6 * abs(order[0])).tolist())
    return found


REQUESTS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-3, 0.1, 0.8, 1.0, 3.0, 1e4]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 500, 2**31 - 1]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, LAST_SEED) | st.sampled_from([0, LAST_SEED]),
)
KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, vocab: random.standard_normal((ROWS, vocab)) * 3,
    "flat": lambda random, vocab: random.standard_normal((ROWS, vocab)) * 1e-3,
    "steep": lambda random, vocab: random.standard_normal((ROWS, vocab)) * 1e3,
    "huge": lambda random, vocab: random.standard_normal((ROWS, vocab)) * 1e30,
    "ties": lambda random, vocab: np.round(random.standard_normal((ROWS, vocab)) * 2),
    "equal": lambda random, vocab: np.full((ROWS, vocab), 2.5),
    "masked": lambda random, vocab: np.where(random.random((ROWS, vocab)) < 0.9, -np.inf, 1.5),
    "far": lambda random, vocab: np.where(random.random((ROWS, vocab)) < 0.9, -3e38, 1.5),
}


@settings(max_examples=120, deadline=None)
@given(
    st.lists(REQUESTS, min_size=ROWS, max_size=ROWS),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([1, 7, 128, 1000, 3001]),
    st.integers(0, 2**31 - 1),
    st.integers(0, 99),
)
def test_rows_of_any_kind_choose_what_sorting_allows(
    asked: list[Sampling], kind: str, vocab: int, position: int, seed: int
) -> None:
    logits = KINDS[kind](np.random.default_rng(seed), vocab).astype(np.float32)
    logits[:, seed % vocab] = 2.0  # at least one is finite
    for row, each, token in zip(logits, asked, tokens(True, logits, asked, position), strict=True):
        expected = {int(row.argmax())} if each.temperature == 0 else acceptable(row, each, position)
        assert int(token) in expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", [1000, 1024, 50_001])
def test_tokens_are_those_of_xla(variant: Variant, vocab: int) -> None:
    random = np.random.default_rng(vocab)
    logits = random.standard_normal((ROWS, vocab)).astype(np.float32) * 3
    each = [Sampling(), *(Sampling(temperature=t, seed=LAST_SEED) for t in (0.5, 1.0, 1.7))]
    asked = each + [Sampling(temperature=0.8, top_k=k, top_p=p) for k, p in ((50, 1.0), (0, 0.9), (9, 0.5))]
    asked += [Sampling(temperature=0.8, min_p=0.05, seed=3)]
    for position in range(5):
        found, wanted = (tokens(native, logits, asked, position, variant) for native in (True, False))
        np.testing.assert_array_equal(found, wanted)


def test_a_token_can_win_by_the_largest_noise() -> None:
    gumbel = np.asarray(noise(jnp.zeros(200, jnp.uint32), jnp.arange(200), 20_000))
    position, lucky = np.unravel_index(gumbel.argmax(), gumbel.shape)
    assert gumbel.max() > 14
    logits, unlucky = np.zeros((1, 20_000)), gumbel[position].argmin()
    for lead, winner in ((-0.01, lucky), (0.01, unlucky)):
        logits[0, unlucky] = gumbel[position, lucky] - gumbel[position, unlucky] + lead
        assert tokens(True, logits, [Sampling(temperature=1.0)], position).tolist() == [winner]


def test_without_filters_top_k_and_top_p_count_for_nothing() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 500))
    cut, free = ([Sampling(temperature=5.0, seed=s, top_k=k) for s in (1, 2)] for k in (1, 0))
    np.testing.assert_array_equal(tokens(True, logits, cut, 3, "plain"), tokens(True, logits, free, 3))


def test_of_equals_at_a_cut_all_can_be_chosen() -> None:
    logits = np.tile(np.asarray([5.0, 1.0, 5.0, 1.0, 5.0, 0.0], np.float32), (400, 1))
    for more in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"top_p": 0.5}):
        asked = [Sampling(temperature=1.0, seed=seed, **more) for seed in range(400)]
        assert set(tokens(True, logits, asked).tolist()) == {0, 2, 4}


def test_the_first_of_equals_is_greedy_and_wins_where_noise_is_nothing() -> None:
    logits = np.full((2, 300), -1e30)
    logits[:, [20, 40, 299]] = 1e30
    assert tokens(True, logits, [Sampling(), Sampling(temperature=1.0)]).tolist() == [20, 20]
    tiny = [Sampling(temperature=1e-38, top_k=3, top_p=0.5)] * 2
    assert tokens(True, logits, tiny).tolist() == [20, 20]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", [16, 1001, 4096])
def test_logits_that_are_not_sound_choose_nothing(native: bool, variant: Variant, vocab: int) -> None:
    logits = np.random.default_rng(1).standard_normal((8, vocab)).astype(np.float32)
    logits[0], logits[1, 3], logits[2], logits[3, 1:] = np.nan, np.inf, -np.inf, -np.inf
    logits[4:] = logits[:4]
    asked = [Sampling(temperature=0.9, top_k=5, top_p=0.9)] * 4 + [Sampling()] * 4
    assert tokens(native, logits, asked, 3, variant).tolist() == [-1, -1, -1, 0] * 2


@pytest.mark.parametrize("vocab", [16, 1001, 4096])
def test_the_kernel_finds_what_is_no_number_anywhere(vocab: int) -> None:
    logits = np.random.default_rng(1).standard_normal((40, vocab)).astype(np.float32)
    logits[np.arange(40), np.linspace(0, vocab - 1, 40).astype(int)] = np.nan
    asked = [Sampling(temperature=0.9 * (row % 2)) for row in range(40)]
    assert tokens(True, logits, asked).tolist() == [-1] * 40


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=6),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.05),
    ],
)
def test_frequencies_follow_the_distribution(asked: Sampling) -> None:
    count, row = 20_000, np.random.default_rng(4).standard_normal(50).astype(np.float32) * 2
    heated = row.astype(np.float64) / asked.temperature
    order = np.argsort(-heated)[: asked.top_k or None]
    share = np.exp(heated[order]) / np.exp(heated[order]).sum()
    order = order[(np.cumsum(share) - share < asked.top_p) & (share >= asked.min_p * share[0])]
    expected = count * np.exp(heated[order]) / np.exp(heated[order]).sum()
    found = tokens(True, np.tile(row, (count, 1)), [asked] * count, np.arange(count), "full")
    counts = np.bincount(found, minlength=50)
    assert counts[order].sum() == count
    often = expected >= 5
    chi_square = ((counts[order] - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum()) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_token_is_the_same_whatever_rows_are_beside_it() -> None:
    logits = np.random.default_rng(2).standard_normal((33, 5000)) * 3
    asked = [Sampling(temperature=0.9, top_p=0.9 if i % 2 else 1.0, seed=i) for i in range(33)]
    together = tokens(True, logits, asked, np.arange(33))
    for row in (0, 1, 17, 32):
        assert tokens(True, logits[row : row + 1], asked[row : row + 1], row) == together[row]


def test_programs_choose_by_the_kernel_only_where_it_is_wanted() -> None:
    logits = jnp.zeros((2, 64))
    choice = Choice(*(jnp.asarray(field) for field in pack_choices([Sampling()] * 2)))
    for variant in VARIANTS:
        texts = {n: WAYS[n][variant].lower(logits, choice, jnp.zeros(2, jnp.int32)).as_text() for n in WAYS}
        assert {native: "llmos_choose" in text for native, text in texts.items()} == {
            True: True,
            False: False,
        }


def test_what_does_not_fit_is_refused() -> None:
    choice = Choice(*(jnp.asarray(field) for field in pack_choices([Sampling()] * 2)))
    call = jax.jit(partial(kernels.choose, cuts=True))
    with pytest.raises(Exception, match="choose takes float32 logits"):
        call(jnp.zeros((3, 64)), choice, jnp.zeros(2, jnp.int32)).block_until_ready()


@pytest.mark.parametrize("variant", ["greedy", "plain", "filtered"])
def test_a_model_on_one_device_chooses_by_the_kernel(tiny_driver: Any, variant: str) -> None:
    driver, loaded = tiny_driver
    (engine,) = driver._engines[loaded.model]
    assert "llmos_choose" in engine.programs.get(("sample", variant, 1)).as_text()
