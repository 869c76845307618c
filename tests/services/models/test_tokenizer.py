"""Tokenizers from GGUF files and folders; on the real model, equal to what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers import decoders as tokenizer_decoders
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers as tokenizer_pre

from llmos.ipc.errors import InvalidArgument, IOFailure, NotSupported
from llmos.services.models import tokenizer as module
from llmos.services.models.tokenizer import ModelTokenizer, load
from tests.services.models.gguf_file import METADATA, write_gguf

RECORDED = json.loads((Path(__file__).parent / "tokens.json").read_text())


def made(tmp_path: Path, **changes: Any) -> ModelTokenizer:
    metadata = {**METADATA, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
    return load(write_gguf(tmp_path / "m.gguf", metadata), tmp_path / "cache")


@pytest.mark.model
def test_it_tokenizes_as_transformers_does(smollm: ModelTokenizer) -> None:
    for row in RECORDED["rows"]:
        assert smollm.encode(row["text"]) == row["ids"], row["text"]
        assert smollm.decode(row["ids"]) == row["decoded"], row["text"]


@pytest.mark.model
def test_only_digits_after_white_space_differ_from_what_transformers_reads_from_the_file() -> None:
    for row in RECORDED["rows"]:
        if row["ids"] != row["plain"]:
            assert any(char.isnumeric() for char in row["text"]), row["text"]
            assert any(char.isspace() for char in row["text"]), row["text"]


@pytest.mark.model
def test_the_real_model_says_where_a_text_ends_and_how_a_chat_looks(smollm: ModelTokenizer) -> None:
    assert (smollm.info.bos, smollm.info.eos, smollm.info.stop) == ("<|im_start|>", "<|im_end|>", [2])
    assert "helpful AI assistant" in smollm.info.chat_template


def test_a_gguf_vocabulary_is_read_with_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = made(tmp_path)
    assert [tokenizer.raw.id_to_token(id) for id in tokenizer.encode("hello</s><own>")] == [
        "hel", "lo", "</s>", "<own>"
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("hello</s><own>")) == "hello<own>"
    assert (tokenizer.info.stop, tokenizer.info.chat_template) == ([260], "T")
    with pytest.raises(InvalidArgument, match="9999"):
        tokenizer.decode([9999])


def test_a_text_begins_with_the_special_token_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, add_bos_token=True)
    assert tokenizer.encode("he")[0] == 259
    assert 259 not in tokenizer.encode("he", template=True)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ123", "'ll"]),
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "'ll"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "'ll"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2", "3", "'ll"]),
    ],
)
def test_each_pre_tokenizer_splits_its_own_way(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = made(tmp_path, pre=pre)
    assert tokenizer.raw.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.raw.pre_tokenizer.pre_tokenize_str("a  123'll")] == pieces


def test_what_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="'weird'"):
        made(tmp_path, pre="weird")
    with pytest.raises(NotSupported, match="'llama'"):
        made(tmp_path, model="llama")
    with pytest.raises(InvalidArgument, match="merge"):
        made(tmp_path, merges=["x yz"])
    with pytest.raises(IOFailure, match="no model"):
        load(tmp_path / "none.gguf", tmp_path / "cache")


def test_the_second_time_it_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path)

    def never(*_: Any) -> Any:
        raise AssertionError("the GGUF file was read again")

    monkeypatch.setattr(module, "_from_gguf", never)
    again = load(tmp_path / "m.gguf", tmp_path / "cache")
    assert again.info == first.info
    assert again.encode("hello") == first.encode("hello")


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    made(tmp_path)
    for path in (tmp_path / "cache").rglob("tokenizer.json"):
        path.write_text("{")
    assert load(tmp_path / "m.gguf", tmp_path / "cache").encode("he")


def folder_of(tmp_path: Path, **config: Any) -> Path:
    tokenizer = Tokenizer(tokenizer_models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizer_pre.Whitespace()
    tokenizer.decoder = tokenizer_decoders.Metaspace()
    folder = tmp_path / "weights"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_says_the_same_in_its_json_files(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "X"}, {"name": "default", "template": "Y"}]
    folder = folder_of(tmp_path, eos_token={"content": "</s>"}, chat_template=templates)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    info = load(folder, tmp_path / "cache").info
    assert (info.eos, info.stop, info.chat_template, info.byte_level) == ("</s>", [1, 2], "Y", False)


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, chat_template="old")
    (folder / "chat_template.jinja").write_text("new")
    assert load(folder, tmp_path / "cache").info.chat_template == "new"
