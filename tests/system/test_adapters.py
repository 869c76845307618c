"""A LoRA adapter on the real model: loaded at run time, asked for over HTTP, dropped; equal to merging it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.models import store
from tests.drivers.jax.lora_files import make_adapter, write_adapter
from tests.system.conftest import Running, boot, prepare

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(900)]

SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536,
}  # fmt: skip
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
NAME = f"{DEFAULT_MODEL}:style"
RANK, ALPHA = 8, 4
PROMPT = "The lighthouse keeper opened the door and"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {
        name: value * (0.2 if "lora_B" in name else 1.0)
        for name, value in make_adapter(SMOLLM2, RANK, MODULES).items()
    }
    return write_adapter(tmp_path_factory.mktemp("style"), tensors, RANK, ALPHA, MODULES)


@pytest.fixture(scope="module")
def roomy() -> Iterator[Running]:
    """A system whose model has room for two adapters."""
    folder = Path(tempfile.mkdtemp(prefix="llmos-"))
    running = prepare(folder)
    manifest = folder / "llmos.toml"
    text = manifest.read_text().partition('[[models]]\nname = "gt-')[0]
    manifest.write_text(text + "max_adapters = 2\nadapter_rank = 8\n")
    try:
        boot(running)
        yield running
        done = running.llmos("down", timeout=90.0)
        assert done.returncode == 0, done.stderr
    finally:
        running.close()
        running.llmos("down", timeout=90.0)
        shutil.rmtree(folder, ignore_errors=True)


def say(client: openai.OpenAI, model: str) -> str:
    done = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0.0)
    return str(done.choices[0].text)


def merged_answer(adapter: Path, count: int) -> list[int]:
    """What transformers generates with the adapter merged into the model's weights, from the GGUF file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    file = Path(os.environ.get("LLMOS_TEST_MODEL") or str(store.find(DEFAULT_MODEL)))
    folder, name = str(file.parent), file.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = model.state_dict()
    for a_name, a in tensors.items():
        if "lora_A" in a_name:
            b = tensors[a_name.replace("lora_A", "lora_B")]
            own = a_name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[own] += torch.from_numpy(np.asarray(ALPHA / RANK * b @ a))
    asked = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**asked, max_new_tokens=count, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True))  # type: ignore[return-value]


def test_an_adapter_is_served_over_http_and_equals_merged_weights(roomy: Running, adapter: Path) -> None:
    client = roomy.openai()
    plain = say(client, DEFAULT_MODEL)
    with pytest.raises(openai.NotFoundError):
        say(client, NAME)
    done = roomy.llmos("load", NAME, str(adapter), timeout=120.0)
    assert done.returncode == 0, done.stderr
    listed = {model.id: model for model in client.models.list().data}
    assert listed[NAME].parent == DEFAULT_MODEL  # type: ignore[attr-defined]
    adapted = say(client, NAME)
    assert adapted != plain
    assert say(client, DEFAULT_MODEL) == plain
    only_base = roomy.openai(roomy.mint("--models", DEFAULT_MODEL))
    with pytest.raises(openai.PermissionDeniedError):
        say(only_base, NAME)
    roomy.wait_restarted("driver.jax0", roomy.kill("driver.jax0"))
    roomy.wait_healthy()
    assert say(roomy.openai(retries=2), NAME) == adapted, "the adapter was loaded again"
    done = roomy.llmos("unload", NAME, timeout=60.0)
    assert done.returncode == 0, done.stderr
    with pytest.raises(openai.NotFoundError):
        say(client, NAME)
    assert adapted.strip() == str(merged_answer(adapter, 24)).strip()
