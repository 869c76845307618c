"""Models on meshes of virtual CPU devices, with no program compiled before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.execution.spec import Spec
from llmos.drivers.sdk.messages import LoadRequest

DATA = Path(__file__).parents[3] / "data" / "families"


class Model:
    """A checkpoint of the family tests on a mesh, and what transformers computes for it."""

    def __init__(
        self, helpers: Any, driver: JaxDriver, name: str, mesh: dict[str, int], **fields: Any
    ) -> None:
        self._helpers, self.driver = helpers, driver
        self.expected = load_file(DATA / name / "expected.tensors")
        self.prompt: list[int] = self.expected["tokens"].tolist()
        sizes = {"page_tokens": 4, "pages": 40, "slots": 2, "max_context": 64, "chunk_tokens": 16}
        request = LoadRequest(**({"model": "m", "source": str(DATA / name), "mesh": mesh} | sizes | fields))
        self.loaded = driver.load(request, helpers.ignore)
        self.engines = driver._engines["m"]

    def run(self, replica: int = 0, **fields: Any) -> tuple[list[int], np.ndarray]:
        """Greedy tokens from the prompt on, in chunks of 7, beside another sequence, and the logits after
        the prompt."""
        engine, seen = self.engines[replica], []
        sample = engine._sample

        def watched(rows: list[int], index: Any, logits: Any) -> Any:
            seen.append(np.asarray(logits)[:, : self.loaded.vocab_size])
            return sample(rows, index, logits)

        engine._sample = watched
        task = self._helpers.Task(self.prompt, len(self.expected["greedy"]), chunk=7, **fields)
        runner = self._helpers.Runner(self.driver, self.loaded)
        tokens = runner.run(task, self._helpers.Task(self.prompt[3:8], 9), replica=replica)[0]
        del engine._sample
        return tokens, seen[0][0]

    def check(self, replica: int = 0, tolerance: float = 5e-5) -> None:
        """Tokens and logits are those of transformers on one device."""
        tokens, logits = self.run(replica)
        np.testing.assert_allclose(logits, self.expected["logits"][-1], atol=tolerance)
        assert tokens == self.expected["greedy"].tolist()


@pytest.fixture
def on_mesh(
    helpers: Any, programs_folder: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Model]]:
    """Loads a model on a mesh; it is unloaded after the test."""
    monkeypatch.setattr(Spec, "ahead", lambda self: [])
    driver = JaxDriver("cpu")

    def load(name: str, mesh: dict[str, int], **fields: Any) -> Model:
        if "m" in driver._engines:
            driver.unload("m")
        return Model(helpers, driver, name, mesh, **({"cache": str(fresh_cache)} | fields))

    yield load
    if "m" in driver._engines:
        driver.unload("m")
