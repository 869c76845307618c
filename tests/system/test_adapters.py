"""A LoRA adapter on the real model: loaded at run time, asked for over HTTP, dropped; equal to merging it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from llmos.services.manifest import DEFAULT_MODEL
from tests.drivers.jax.lora_files import ALPHA, MODULES, PROMPT, RANK, smollm2_adapter, write_adapter
from tests.system.conftest import Running, boot, prepare

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(900)]

NAME = f"{DEFAULT_MODEL}:style"
REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "smollm2-135m-adapter.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("style")
    return write_adapter(folder, smollm2_adapter(), RANK, ALPHA, MODULES)


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
    assert adapted == json.loads(REFERENCE.read_text())["text"], "as transformers with merged weights"
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
