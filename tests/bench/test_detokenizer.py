"""What it costs to turn tokens into text as they come; 256 streams of 50 tokens a second leave 78 us each."""

from __future__ import annotations

import random

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Tokenizer, decoders, models

from llmos.services.models.detokenizer import detokenizer
from llmos.services.models.tokenizer import BYTES, ModelTokenizer, TokenizerInfo


def byte_level() -> ModelTokenizer:
    """A vocabulary of bytes and of 50,000 merged pieces."""
    rng, letters = random.Random(3), list(BYTES)
    pieces = {"".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(50_000)}
    vocabulary = {token: id for id, token in enumerate([*letters, *sorted(pieces)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return ModelTokenizer(tokenizer, TokenizerInfo(byte_level=True))


def metaspace() -> ModelTokenizer:
    """A vocabulary in the manner of SentencePiece, with byte fallback."""
    rng = random.Random(3)
    pieces = {"▁" + "".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 9))) for _ in range(20_000)}
    tokens = [*[f"<0x{byte:02X}>" for byte in range(256)], *sorted(pieces)]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return ModelTokenizer(tokenizer, TokenizerInfo())


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_1000_tokens_one_by_one(benchmark: BenchmarkFixture, make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    rng = random.Random(5)
    tokens = [rng.randrange(256, tokenizer.raw.get_vocab_size()) for _ in range(1000)]

    def turn() -> int:
        text = detokenizer(tokenizer, tokens[:4])
        return sum(len(text.feed([token])) for token in tokens) + len(text.finish())

    assert benchmark(turn) > 1000
