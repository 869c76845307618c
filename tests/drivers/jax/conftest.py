"""Tiny random checkpoints in real formats, a dense NumPy decoder to compare with, and a small scheduler."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import save_file

from llmos.drivers.jax import platform
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.loading import sizing
from llmos.drivers.jax.native import kernels
from llmos.drivers.sdk.messages import Chunk, LoadedModel, LoadRequest, Quantum, Sampling, Start, Step
from llmos.ipc import paths

platform.set_option("jax_num_cpu_devices", 8)  # models run on the first, unless a mesh takes more

Tensors = dict[str, np.ndarray]

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Random weights under Hugging Face's names, scaled so that logits are spread out."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 2 / np.sqrt(shape[-1])).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": norm()}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        tensors |= {
            at + "input_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": matrix(hidden, hidden),
            at + "self_attn.k_proj.weight": matrix(kv, hidden),
            at + "self_attn.v_proj.weight": matrix(kv, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, hidden),
            at + "post_attention_layernorm.weight": norm(),
            at + "mlp.gate_proj.weight": matrix(inner, hidden),
            at + "mlp.up_proj.weight": matrix(inner, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    return tensors


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """A safetensors folder as Hugging Face writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for index, file in enumerate(files):
        save_file({name: tensors[name] for name in names[index::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[names.index(name) % shards] for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def gguf_name(name: str) -> str:
    """llama.cpp's name for a Hugging Face tensor name."""
    for old, new in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }.items():
        name = name.replace(old, new)
    return name


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order that llama.cpp's converter gives them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """A GGUF file as llama.cpp's converter writes it, in float32."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_token_list([f"token-{i}" for i in range(5000)])
    for name, value in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        writer.add_tensor(gguf_name(name), permuted(value, config[heads]) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense_logits(config: dict[str, Any], tensors: Tensors, tokens: list[int]) -> np.ndarray:
    """Logits [len(tokens), vocab] of a plain, dense Llama decoder in float64."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    count = len(tokens)
    inverse = config["rope_theta"] ** -(np.arange(0, size, 2) / size)
    angles = np.arange(count)[:, None] * inverse
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        h = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (h @ w[at + f"self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k = rotate(q.reshape(count, heads, size)), rotate(k.reshape(count, kv_heads, size))
        k, v = (np.repeat(y.reshape(count, kv_heads, size), heads // kv_heads, axis=1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(count, -1)
        x = x + mixed @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = (h @ w[at + f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ head.T


def dense_greedy(config: dict[str, Any], tensors: Tensors, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation by the dense decoder."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_logits(config, tensors, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@dataclass
class Task:
    """A sequence for ``Runner``: it wants ``count`` tokens more than ``known``."""

    known: list[int]
    count: int
    prompt: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    stop: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    chunk: int = 0


@dataclass
class Runner:
    """A small scheduler over a driver: it gives slots and pages, composes quanta and collects tokens."""

    driver: JaxDriver
    loaded: LoadedModel
    quanta: int = 0
    occupied: list[int] = field(default_factory=list)

    def steps(self, steps: int, **fields: Any) -> list[Step]:
        """Execute one quantum with at most two steps pending, as the SDK does."""
        self.quanta += 1
        quantum = Quantum(id=self.quanta, model=self.loaded.model, steps=steps, **fields)
        pending: list[Callable[[], Step]] = []
        done = []
        iterator = self.driver.execute(quantum)
        self.occupied = [slot for slot in self.occupied if slot not in quantum.release]
        self.occupied += [start.slot for start in quantum.start]
        for step in iterator:
            pending.append(step)
            if len(pending) == 2:
                done.append(pending.pop(0)())
        return done + [step() for step in pending]

    def run(self, *tasks: Task, replica: int = 0) -> list[list[int]]:
        """All tasks in one batch, prefilled one after another, until each has its tokens; then released."""
        starts, chunks, step = [], [], 0
        for slot, task in enumerate(tasks):
            starts.append(self.start(slot, task))
            at = task.cached
            while at < len(task.known):
                length = min(task.chunk or self.loaded.chunk_tokens, len(task.known) - at)
                chunks.append(Chunk(step, slot, at, length))
                at, step = at + length, step + 1
        slots = list(range(len(tasks)))
        longest = max(task.count for task in tasks)
        done = self.steps(step + longest, start=starts, chunks=chunks, decode=slots, replica=replica)
        self.steps(1, release=slots, replica=replica)
        return [tokens_of(done, slot) for slot in slots]

    def start(self, slot: int, task: Task) -> Start:
        """The start of a task with as many pages as it will ever need, unless it brings its own."""
        limit = len(task.known) + task.count
        return Start(
            slot=slot,
            tokens=task.known,
            prompt=task.prompt or len(task.known),
            pages=task.pages or self.pages(slot, limit),
            cached=task.cached,
            limit=limit,
            stop=task.stop,
            sampling=task.sampling,
        )

    def pages(self, slot: int, tokens: int) -> list[int]:
        """Pages of a slot, spread over the cache so that neighbours in a table are not neighbours in it."""
        each = -(-self.loaded.max_context // self.loaded.page_tokens)
        return [slot + i * self.loaded.slots for i in range(each)][: -(-tokens // self.loaded.page_tokens)]

    def clear(self) -> None:
        """Release every slot."""
        if self.occupied:
            self.steps(1, release=self.occupied)


def tokens_of(steps: list[Step], slot: int) -> list[int]:
    """The tokens that a slot produced, in order."""
    return [token for step in steps for number, token in zip(step.slots, step.tokens) if number == slot]


def ignore(_: object) -> None:
    """A progress callback for loads that nobody watches."""


@pytest.fixture(scope="session")
def tiny_tensors() -> Tensors:
    return random_tensors(TINY)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tensors: Tensors) -> Path:
    return write_folder(tmp_path_factory.mktemp("tiny"), TINY, tiny_tensors)


@pytest.fixture(scope="session", autouse=True)
def native_kernels() -> bool:
    """Native kernels in the user's own cache, lest every folder of a test have them compiled again."""
    return kernels.enable(paths.cache_dir() / "native")


@pytest.fixture(scope="session")
def programs_folder(pytestconfig: pytest.Config) -> Path:
    """Compiled programs of all tests, kept from one run of pytest to the next."""
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("jax-programs"))


def make_cache(folder: Path, programs: Path) -> Path:
    """A driver's cache folder without weights, but with the programs that other tests have compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "programs").symlink_to(programs)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, programs_folder: Path) -> Path:
    """A cache folder that tests share, weights included."""
    return make_cache(tmp_path_factory.mktemp("shared"), programs_folder)


@pytest.fixture
def fresh_cache(tmp_path: Path, programs_folder: Path) -> Path:
    """A cache folder without weights."""
    return make_cache(tmp_path / "cache", programs_folder)


def load_tiny(folder: Path, cache: Path, mesh: dict[str, int]) -> tuple[JaxDriver, LoadedModel]:
    """A driver with the tiny model on a mesh."""
    driver = JaxDriver("cpu")
    request = LoadRequest(
        model="tiny",
        source=str(folder),
        cache=str(cache),
        page_tokens=8,
        pages=256,
        slots=8,
        max_context=256,
        chunk_tokens=64,
        mesh=mesh,
    )
    return driver, driver.load(request, ignore)


@pytest.fixture(scope="session")
def tiny_driver(tiny_folder: Path, cache_folder: Path) -> tuple[JaxDriver, LoadedModel]:
    return load_tiny(tiny_folder, cache_folder, {})


@pytest.fixture(scope="session")
def staged_driver(tiny_folder: Path, cache_folder: Path) -> tuple[JaxDriver, LoadedModel]:
    """The tiny model in two pipeline stages."""
    return load_tiny(tiny_folder, cache_folder, {"pipeline": 2})


@pytest.fixture(scope="session")
def mixing_driver(tiny_folder: Path, cache_folder: Path) -> tuple[JaxDriver, LoadedModel]:
    """The tiny model as on a GPU, where prompts and decoding share programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "mixes", lambda request, place: True)
        return load_tiny(tiny_folder, cache_folder, {})


@pytest.fixture
def runner(tiny_driver: tuple[JaxDriver, LoadedModel]) -> Iterator[Runner]:
    runner = Runner(*tiny_driver)
    yield runner
    runner.clear()


@pytest.fixture(scope="session")
def model_file() -> Path:
    """The real SmolLM2-135M-Instruct GGUF file."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = home / "llmos" / "models" / "smollm2-135m-instruct" / "model.gguf"
    path = Path(os.environ.get("LLMOS_TEST_MODEL") or default)
    if not path.exists():
        pytest.skip("the real model is missing: set LLMOS_TEST_MODEL or run `llmos pull`")
    return path


@pytest.fixture(scope="session")
def helpers() -> Any:
    """This module, whose functions tests use; test folders are not packages."""
    import sys

    return sys.modules[__name__]
