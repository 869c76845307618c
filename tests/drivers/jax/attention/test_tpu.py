"""The TPU's backend, the library's kernel in interpret mode, against the XLA backend; when it is selected.

jax's interpreter cannot run two things of that kernel as they are: ``InterpretParams`` reads no reshaped
reference, and the older one, used here, has no masked store at a constant index. The store is replaced by
its equal.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmos.drivers.jax.attention.caches import Cache, PagedCache
from llmos.drivers.jax.attention.plans import DecodePlan, PrefillPlan, Scoring
from llmos.drivers.jax.attention.selection import page_bytes, select
from llmos.drivers.jax.attention.tpu import PairedCache, TpuAttention
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.sdk.messages import LoadRequest

PAGE, PAGES, WIDTH, SIZE = 8, 25, 6, 128
BACKEND = TpuAttention(blocks=(2, 4))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def store(ref: Any, value: Any, *, mask: Any) -> None:
        ref[...] = jnp.where(mask, value, ref[...])

    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pltpu, "store", store)
    yield
    jax.clear_caches()


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def pages() -> tuple[PagedCache, PairedCache, jax.Array]:
    """The same pages for both backends, and the tables of three rows."""
    k, v = normal(PAGES, 2, PAGE, SIZE), normal(PAGES, 2, PAGE, SIZE, seed=1)
    pairs = jnp.stack([k, v], axis=2).reshape(PAGES, 4, PAGE, SIZE).swapaxes(1, 2)
    tables = np.random.default_rng(2).permutation(PAGES - 1)[: 3 * WIDTH].reshape(3, WIDTH)
    return PagedCache(k, v), PairedCache(pairs), jnp.asarray(tables, jnp.int32)


def paired(cache: Cache) -> jax.Array:
    return jnp.stack([cache.k, cache.v], axis=2).reshape(PAGES, 4, PAGE, SIZE).swapaxes(1, 2)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=11, cap=2.0, scale=0.2)])
def test_decode_equals_the_other_backend(scoring: Scoring) -> None:
    whole, pairs, tables = pages()
    lengths = jnp.asarray([1, 17, 0])
    at = jnp.maximum(lengths - 1, 0)
    where = jnp.where(lengths > 0, tables[jnp.arange(3), at // PAGE], PAGES)
    plan = DecodePlan(tables, lengths, where, at % PAGE)
    new = normal(3, 4, SIZE, seed=3), normal(3, 2, SIZE, seed=4), normal(3, 2, SIZE, seed=5)
    out, cache = BACKEND.decode(plan, pairs, *new, scoring)
    expected, reference = XlaAttention().decode(plan, whole, *new, scoring)
    np.testing.assert_allclose(out[:2], expected[:2], atol=2e-6)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(cache.kv, paired(reference))


@pytest.mark.usefixtures("interpreted")
def test_a_later_chunk_of_padded_rows_equals_the_other_backend() -> None:
    whole, pairs, tables = pages()
    starts, counts, chunk = jnp.asarray([5, 0, 30]), jnp.asarray([6, 0, 3]), 6
    position = starts[:, None] + jnp.arange(chunk)
    where = jnp.where(
        jnp.arange(chunk) < counts[:, None], jnp.take_along_axis(tables, position // PAGE, axis=1), PAGES
    )
    plan = PrefillPlan(tables, starts, starts + counts, where, position % PAGE)
    q, k, v = (normal(3, chunk, n, SIZE, seed=n) for n in (4, 2, 2))
    out, cache = BACKEND.prefill(plan, pairs, q, k, v, fresh=False, scoring=Scoring(window=9))
    expected, reference = XlaAttention().prefill(plan, whole, q, k, v, scoring=Scoring(window=9))
    for row, count in enumerate(counts.tolist()):
        np.testing.assert_allclose(out[row, :count], expected[row, :count], atol=2e-6)
    np.testing.assert_array_equal(cache.kv, paired(reference))


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=1024, cap=30.0)])
def test_the_kernel_can_be_lowered_for_a_tpu(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax._src.pallas.mosaic.tpu_info.get_device_kind", lambda: "TPU v5")
    monkeypatch.setattr("jax._src.pallas.mosaic.tpu_info.get_num_device_cores", lambda: 1)
    tables, (lengths, where, offsets) = jnp.zeros((16, 32), jnp.int32), jnp.zeros((3, 16), jnp.int32)
    shapes = [(64, 64, 16, SIZE), (16, 32, SIZE), (16, 8, SIZE), (16, 8, SIZE)]
    cache, q, k, v = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    run = partial(TpuAttention(blocks=(8, 32)).decode, scoring=scoring)
    traced = jax.jit(run).trace(DecodePlan(tables, lengths, where, offsets), PairedCache(cache), q, k, v)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_scrub_clears_only_what_is_not_finite() -> None:
    spoilt = PairedCache(jnp.ones((3, PAGE, 4, SIZE)).at[1, 0, 0].set(jnp.nan))
    sound = BACKEND.scrub(spoilt, jnp.asarray([1, PAGES])).kv
    assert not np.asarray(sound[1, 0, 0]).any()
    assert float(sound.sum()) == sound.size - SIZE


def config(head_dim: int = 128, kv_heads: int = 8) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=8, hidden=64, layers=1, heads=24, kv_heads=kv_heads, head_dim=head_dim, intermediate=8,
        norm_eps=1e-5, rope_theta=1e4, max_positions=64,
    )  # fmt: skip


def test_a_page_is_as_large_as_on_the_other_backends() -> None:
    layer = jax.eval_shape(lambda: BACKEND.allocate(config(), 1, 16, jnp.bfloat16))[0]
    assert layer.kv.size * 2 == page_bytes(config(), 16, jnp.bfloat16)


def test_a_tpu_gets_it_where_the_model_fits_and_is_told_otherwise() -> None:
    request = LoadRequest(model="m", source="", dtype="bfloat16", kv_dtype="bfloat16")
    assert select("auto", "tpu", config(), request).name == "tpu"
    assert "head_dim a multiple of 128, here 64" in select("auto", "tpu", config(64), request).name
    assert "fill its tiles" in select("auto", "tpu", config(kv_heads=3), request).name
    small = LoadRequest(model="m", source="", dtype="bfloat16", kv_dtype="int8")
    assert "asked for is int8" in select("auto", "tpu", config(), small).name
    spread = LoadRequest(model="m", source="", dtype="bfloat16", kv_dtype="bfloat16", mesh={"tensor": 2})
    assert select("auto", "tpu", config(), spread).name == "xla (tpu needs a model on one device)"
