"""Detokenizing as tokens come: whole characters only, and in sum what decoding everything gives."""

from __future__ import annotations

import operator
from functools import cache, reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from llmos.services.models.detokenizer import ByteDetokenizer, WindowDetokenizer, detokenizer
from llmos.services.models.tokenizer import BYTES, ModelTokenizer, TokenizerInfo

PIECES = ["▁a", "b", "▁", "c▁d", "é", "▁日本"]


@cache
def byte_level() -> ModelTokenizer:
    """All bytes, some merged tokens, a special token and an added one."""
    stand_in = {byte: char for char, byte in BYTES.items()}
    words = ["".join(stand_in[b] for b in text.encode()) for text in ("hello", " ü", "👋", "日本")]
    broken = "".join(stand_in[b] for b in "日本".encode()[:4])
    vocabulary = {token: id for id, token in enumerate([*BYTES, *words, broken])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<end>", special=True), AddedToken("my own é", special=False)])
    return ModelTokenizer(tokenizer, TokenizerInfo(byte_level=True))


@cache
def metaspace() -> ModelTokenizer:
    """A vocabulary in the manner of SentencePiece, with byte fallback."""
    tokens = [*PIECES, *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return ModelTokenizer(tokenizer, TokenizerInfo())


def ids(tokenizer: ModelTokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.raw.get_vocab_size() - 1), max_size=40)


@given(ids(byte_level()), st.integers(1, 5))
def test_byte_level_tokens_in_any_pieces_give_the_whole_text(tokens: list[int], step: int) -> None:
    tokenizer = byte_level()
    state = detokenizer(tokenizer, [])
    assert isinstance(state, ByteDetokenizer)
    shown = [state.feed(tokens[at : at + step]) for at in range(0, len(tokens), step)]
    assert "".join(shown) + state.finish() == tokenizer.decode(tokens)


@given(st.text(max_size=30))
def test_no_half_character_is_ever_shown(text: str) -> None:
    tokenizer = byte_level()
    state = detokenizer(tokenizer, [])
    stand_in = {byte: char for char, byte in BYTES.items()}
    tokens = [tokenizer.raw.token_to_id(stand_in[byte]) for byte in text.encode()]
    shown = ""
    for token in tokens:
        assert token is not None
        shown += state.feed([token])
        assert text.startswith(shown)
    assert shown == text


def pieces_and_characters() -> st.SearchStrategy[list[int]]:
    """Tokens as a model writes them: pieces, and characters of several bytes."""
    piece = st.integers(0, len(PIECES) - 1).map(lambda id: [id])
    char = st.characters(codec="utf-8", min_codepoint=0x80).map(
        lambda c: [len(PIECES) + byte for byte in c.encode()]
    )
    return st.lists(st.one_of(piece, char), max_size=20).map(lambda parts: reduce(operator.iadd, parts, []))


@given(pieces_and_characters())
def test_other_vocabularies_give_the_whole_text_too(tokens: list[int]) -> None:
    tokenizer = metaspace()
    state = detokenizer(tokenizer, [])
    assert isinstance(state, WindowDetokenizer)
    assert "".join(state.feed([token]) for token in tokens) + state.finish() == tokenizer.decode(tokens)


def test_a_space_that_decoding_strips_is_kept_after_a_prompt() -> None:
    state = detokenizer(metaspace(), [0, 1])
    assert state.feed([0]) == " a"


@pytest.mark.parametrize("tail", [b"\xe6", b"\xf0\x9f\x91"])
def test_what_never_becomes_a_character_is_told_at_the_end(tail: bytes) -> None:
    tokenizer = byte_level()
    stand_in = {byte: char for char, byte in BYTES.items()}
    tokens = [tokenizer.raw.token_to_id(stand_in[byte]) for byte in tail]
    state = detokenizer(tokenizer, [])
    assert state.feed([token for token in tokens if token is not None]) == ""
    assert state.finish() == "�"
