"""A model over a mesh computes what it computes on one device, along every axis and across them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from llmos.drivers.jax.sampling.sampling import variant_of
from llmos.drivers.sdk.messages import Sampling

DATA = Path(__file__).parents[3] / "data" / "families"
OnMesh = Callable[..., Any]

CASES = {
    "llama-tensor": ("llama", {"tensor": 2}),
    "llama-repeated-kv-heads": ("llama", {"tensor": 4}),
    "gemma2-windows-and-caps": ("gemma2", {"tensor": 2}),
    "gpt2-biases": ("gpt2", {"tensor": 4}),
    "mixtral-expert": ("mixtral", {"expert": 4}),
    "mixtral-tensor": ("mixtral", {"tensor": 2}),
    "gemma2-sequence-and-tensor": ("gemma2", {"sequence": 2, "tensor": 2}),
    "qwen3_moe-expert-and-tensor": ("qwen3_moe", {"expert": 2, "tensor": 2}),
    "gemma2-pipeline-tied-embedding": ("gemma2", {"pipeline": 2}),
    "gpt2-pipeline-learned-positions": ("gpt2", {"pipeline": 2}),
    "gemma3-pipeline-uneven": ("gemma3", {"pipeline": 4}),
    "qwen3_moe-pipeline-of-unlike-layers": ("qwen3_moe", {"pipeline": 2}),
    "llama-pipeline-and-tensor": ("llama", {"pipeline": 2, "tensor": 2}),
    "mixtral-pipeline-and-expert": ("mixtral", {"pipeline": 2, "expert": 2}),
    "mistral-pipeline-and-sequence": ("mistral", {"pipeline": 2, "sequence": 2}),
}


@pytest.mark.parametrize(("name", "mesh"), CASES.values(), ids=CASES)
def test_tokens_and_logits_are_those_of_one_device(on_mesh: OnMesh, name: str, mesh: dict[str, int]) -> None:
    on_mesh(name, mesh).check()


def test_a_context_is_longer_than_one_device_holds(on_mesh: OnMesh) -> None:
    model = on_mesh("llama", {"sequence": 4}, pages=32)
    (held,) = {shard.data.shape[0] for shard in model.engines[0].replica.caches[0].k.addressable_shards}
    assert held * model.loaded.page_tokens < len(model.prompt) + len(model.expected["greedy"])
    model.check()


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_replicas_have_slots_and_pages_of_their_own(on_mesh: OnMesh, axis: str) -> None:
    model = on_mesh("llama", {"data": 2, axis: 2})
    assert model.loaded.replicas == 2
    assert model.engines[0].limits == model.engines[1].limits
    weights = [jax.tree.leaves(engine.replica.weights_for(adapters=True)) for engine in model.engines]
    devices = [{d for w in held for d in w.devices()} for held in weights]
    assert [len(each) for each in devices] == [2, 2]
    assert not devices[0] & devices[1]
    model.check(replica=1)
    model.check(replica=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.9, min_p=0.02, seed=3),
        Sampling(temperature=0.9, top_p=0.9, seed=3),
        Sampling(temperature=0.9, top_p=0.9, seed=3, presence_penalty=0.5),
    ],
    ids=variant_of,
)
def test_sampled_tokens_are_those_of_one_device(on_mesh: OnMesh, sampling: Sampling) -> None:
    tokens = [on_mesh("llama", mesh).run(sampling=sampling)[0] for mesh in ({}, {"tensor": 2})]
    assert tokens[0] == tokens[1]


def test_a_step_sums_twice_a_layer_and_once_for_the_embedding(on_mesh: OnMesh) -> None:
    model = on_mesh("llama", {"tensor": 2})
    program = model.engines[0].programs.get(("decode", 2)).as_text()
    assert program.count(" all-reduce(") == 2 * 2 + 1
    assert " all-gather(" not in program


@pytest.mark.parametrize("variant", ["greedy", "plain", "filtered"])
def test_only_top_k_and_top_p_need_the_logits_of_all_devices(on_mesh: OnMesh, variant: str) -> None:
    model = on_mesh("llama", {"tensor": 2})
    program = model.engines[0].programs.get(("sample", variant, 2)).as_text()
    assert (" all-gather(" in program) == (variant == "filtered")


def test_a_step_updates_the_pages_of_every_device_in_place(on_mesh: OnMesh) -> None:
    engine = on_mesh("llama", {"tensor": 2}).engines[0]
    held = sum(part.addressable_shards[0].data.nbytes for part in jax.tree.leaves(engine.replica.caches))
    assert engine.programs.get(("decode", 2)).memory_analysis().alias_size_in_bytes == held


def test_guesses_are_verified_over_a_mesh(on_mesh: OnMesh) -> None:
    model = on_mesh("llama", {"tensor": 2}, speculation="ngram", speculation_tokens=2)
    model.engines[0].speculation.policy.always = True
    model.check()
    assert model.engines[0].speculation.steps.keys() >= {(2, 2)}


def test_a_draft_model_guesses_over_a_mesh(on_mesh: OnMesh) -> None:
    fields = {"speculation": "draft", "speculation_tokens": 2, "draft": str(DATA / "llama")}
    model = on_mesh("llama", {"tensor": 2}, **fields)
    speculation = model.engines[0].speculation
    speculation.policy.always = True
    model.check()
    assert speculation.steps.keys() >= {(2, 2)}


def test_programs_are_rehearsed_over_a_mesh(on_mesh: OnMesh) -> None:
    model = on_mesh("llama", {"tensor": 2})
    engine = model.engines[0]
    engine.unrehearsed = [("decode", 2), ("prefill", 1, 16, False), ("sample", "plain", 2)]
    while engine.rehearse():
        pass
    model.check()


def test_an_idle_driver_rehearses_its_replicas_by_turns(on_mesh: OnMesh) -> None:
    model = on_mesh("llama", {"data": 2})
    for engine in model.engines:
        engine.unrehearsed = [("decode", 2), ("sample", "greedy", 2)]
    left = []
    while model.driver.idle():
        left.append([len(engine.unrehearsed) for engine in model.engines])
    assert left == [[1, 2], [1, 1], [0, 1], [0, 0]]
