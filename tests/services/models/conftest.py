"""The real model's files, where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmos.services.models import store
from llmos.services.models.tokenizer import ModelTokenizer, load


def find_model() -> Path | None:
    named = os.environ.get("LLMOS_TEST_MODEL")
    return Path(named) if named else store.find("smollm2-135m-instruct")


MODEL = find_model()


@pytest.fixture(scope="session")
def model_file() -> Path:
    if MODEL is None:
        pytest.skip("the model is not here: llmos pull smollm2-135m-instruct, or set LLMOS_TEST_MODEL")
    return MODEL


@pytest.fixture(scope="session")
def smollm(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return load(model_file, tmp_path_factory.mktemp("cache"))
