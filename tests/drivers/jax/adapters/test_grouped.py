"""The kernels that give each token its own adapter, interpreted on a CPU, beside plain products."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.adapters import grouped, lora
from llmos.drivers.jax.decoder.layers import product


def arrays(tokens: int, inner: int, parts: tuple[int, ...], adapters: int, rank: int) -> list[jax.Array]:
    """y, x, A and B, scaled so that all that is added is near one."""
    rng = np.random.default_rng(0)
    shapes = (
        ((tokens, sum(parts)), 1.0),
        ((tokens, inner), 1.0),
        ((adapters, len(parts) * rank, inner), inner**-0.5),
        ((sum(parts), adapters, rank), rank**-0.5),
    )
    return [jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32) for shape, scale in shapes]


def expected(
    y: jax.Array, x: jax.Array, numbers: np.ndarray, a: jax.Array, b: jax.Array, parts: tuple[int, ...]
) -> np.ndarray:
    made, given, inner, outer = (np.array(each) for each in (y, x, a, b))
    bounds = np.cumsum(parts)[:-1]
    for token, number in enumerate(numbers):
        if number:
            pieces = np.split(inner[number - 1] @ given[token], len(parts))
            both = zip(np.split(outer[:, number - 1], bounds), pieces, strict=True)
            made[token] += np.concatenate([part @ piece for part, piece in both])
    return made


@pytest.mark.parametrize("programs", [132, 8])
@pytest.mark.parametrize(
    ("tokens", "inner", "parts", "adapters", "rank"),
    [
        (1, 64, (32,), 1, 16),  # the least there is
        (5, 128, (64, 32, 32), 3, 16),  # fewer tokens than a block, adapters that are no power of two
        (70, 1088, (128,), 9, 16),  # two blocks of tokens, two of adapters, splits that are not alike
        (16, 2048, (64, 64), 5, 32),
        (3, 64, (96,), 2, 128),  # an adapter at a time
    ],
)
def test_each_token_gets_what_its_own_adapter_adds(
    tokens: int,
    inner: int,
    parts: tuple[int, ...],
    adapters: int,
    rank: int,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouped, "PROGRAMS", programs)  # few are worth several adapters each
    y, x, a, b = arrays(tokens, inner, parts, adapters, rank)
    mixed = np.random.default_rng(1).integers(0, adapters + 1, tokens).astype(np.int32)
    for numbers in (mixed, np.full_like(mixed, adapters)):
        result = grouped.add(y, x, jnp.asarray(numbers), a, b, parts, interpret=True)
        np.testing.assert_allclose(result, expected(y, x, numbers, a, b, parts), rtol=1e-4, atol=1e-4)


def test_what_has_no_adapter_is_left_exactly_as_it_is_whatever_is_beside_it() -> None:
    y, x, a, b = (jnp.asarray(each, jnp.bfloat16) for each in arrays(80, 512, (64, 32), 2, 16))
    numbers = np.zeros(80, np.int32)
    result = grouped.add(y, x, jnp.asarray(numbers), a, b, (64, 32), interpret=True)
    np.testing.assert_array_equal(result, y)
    numbers[[3, 7]] = 2
    x = x.at[3].set(jnp.nan)
    result = grouped.add(y, x, jnp.asarray(numbers), a, b, (64, 32), interpret=True)
    others = np.delete(np.arange(80), [3, 7])
    np.testing.assert_array_equal(result[others], y[others])
    assert jnp.isnan(result[3]).all()
    assert (result[7] != y[7]).any()


@pytest.mark.parametrize("tokens", [1, 16, 64, 100, 2048, 8192])
@pytest.mark.parametrize(
    ("inner", "parts"), [(4096, (4096, 1024, 1024)), (14336, (4096,)), (576, (1536, 1536))]
)
def test_the_work_is_cut_so_that_nothing_is_left_over(
    tokens: int, inner: int, parts: tuple[int, ...]
) -> None:
    a, b = np.empty((8, 16 * len(parts), inner), bool), np.empty((sum(parts), 8, 16), bool)
    tile = grouped.tiling(tokens, a, b, parts)
    assert inner % tile.inner == 0
    assert all(size % tile.outer == 0 for size in parts)
    assert (tile.tokens in (16, 32, 64), tile.group) == (True, 8)
    assert tile.splits == 1 or inner // tile.splits >= grouped.SPAN
    assert tile.splits == 1 or tile.splits * -(-tokens // tile.tokens) <= 2 * grouped.PROGRAMS


def test_a_decode_step_of_an_8b_model_keeps_multiprocessors_busy_and_shares_what_it_reads() -> None:
    parts = (4096, 1024, 1024)
    a, b = np.empty((8, 48, 4096), bool), np.empty((6144, 8, 16), bool)
    tile = grouped.tiling(64, a, b, parts)
    assert (tile.beside, tile.splits) == (4, 8)
    assert 8 // tile.beside * len(parts) * tile.splits >= grouped.PROGRAMS // 4
    assert sum(parts) // tile.outer >= grouped.PROGRAMS


def test_rows_of_several_tokens_have_their_adapter_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "choose", lambda *_: "grouped")
    monkeypatch.setattr(grouped, "add", partial(grouped.add, interpret=True))
    y, x, a, b = arrays(12, 64, (64, 32), 2, 16)
    with lora.serving(jnp.asarray([2, 0, 1])):
        result = lora.add(y.reshape(3, 4, -1), x.reshape(3, 4, -1), a, b, (64, 32), product)
    numbers = np.repeat([2, 0, 1], 4)
    np.testing.assert_allclose(
        result.reshape(12, -1), expected(y, x, numbers, a, b, (64, 32)), rtol=1e-4, atol=1e-4
    )


def test_shapes_that_do_not_fit_are_refused_with_all_of_them() -> None:
    y, x, a, b = (jnp.asarray(each) for each in arrays(4, 64, (32,), 2, 16))
    numbers = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"parts \(64,\)"):
        grouped.add(y, x, numbers, a, b, (64,), interpret=True)
    with pytest.raises(ValueError, match=r"B \(32, 2, 8\)"):
        grouped.add(y, x, numbers, a[:, :8], b[..., :8], (32,), interpret=True)
