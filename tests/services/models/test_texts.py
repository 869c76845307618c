"""Texts as encoders take them: special tokens, pairs, truncation; and tokenizers without tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmos.ipc.errors import InvalidArgument
from llmos.services.models import scores
from llmos.services.models.texts import Tokens, encode
from llmos.services.models.tokenizer import BYTES, ModelTokenizer, load

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg", "##b", "é", "e", "中"]


@pytest.fixture
def bert(tmp_path: Path) -> ModelTokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return load(tmp_path, tmp_path / "cache")


@pytest.fixture
def roberta(tmp_path: Path) -> ModelTokenizer:
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *BYTES, "he"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    return load(tmp_path, tmp_path / "cache")


def words(tokenizer: ModelTokenizer, tokens: Tokens) -> str:
    return " ".join(str(tokenizer.raw.id_to_token(id)) for id in tokens.ids)


def test_a_bert_vocabulary_splits_words_and_drops_case_and_accents(bert: ModelTokenizer) -> None:
    (made,) = encode(bert, ["A É ab 中x [MASK]"], 16)
    assert words(bert, made) == "[CLS] a e a ##b 中 [UNK] [MASK] [SEP]"
    assert made.types == [0] * 9


def test_a_cased_vocabulary_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"do_lower_case": false, "unk_token": {"content": "[UNK]"}}'
    )
    cased = load(tmp_path, tmp_path / "cache")
    assert words(cased, encode(cased, ["A é"], 8)[0]) == "[CLS] [UNK] é [SEP]"


def test_a_roberta_vocabulary_is_of_bytes_and_pairs_have_two_separators(roberta: ModelTokenizer) -> None:
    (made,) = encode(roberta, ["he"], 16)
    assert words(roberta, made) == "<s> he </s>"
    (pair,) = encode(roberta, ["he"], 16, seconds=["h"])
    assert words(roberta, pair) == "<s> he </s> </s> h </s>"
    assert set(pair.types) == {0}


def test_what_was_converted_is_kept(bert: ModelTokenizer, tmp_path: Path) -> None:
    again = load(tmp_path, tmp_path / "cache")
    assert again.raw.to_str() == bert.raw.to_str()
    assert len([*(tmp_path / "cache" / "tokenizers").iterdir()]) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json"),
        ({"vocab.txt": "a\nb\n"}, r"no token '\[UNK\]'"),
        ({"vocab.json": "[1]", "merges.txt": ""}, "damaged"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nx y\n"}, "do not fit|damaged"),
    ],
)
def test_a_damaged_vocabulary_says_what_is_wrong(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        load(tmp_path, tmp_path / "cache")


def test_pairs_have_types(bert: ModelTokenizer) -> None:
    (made,) = encode(bert, ["a b"], 16, seconds=["c"])
    assert words(bert, made) == "[CLS] a b [SEP] c [SEP]"
    assert made.types == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ("a b c d e f", None, "[CLS] a b c d e f [SEP]"),
        ("a b c d e f g", None, "[CLS] a b c d e f [SEP]"),
        ("a", "b c d e f g", "[CLS] a [SEP] b c d e [SEP]"),
        ("b c d e f g", "a", "[CLS] b c d e [SEP] a [SEP]"),
        ("a b c d", "a b c d e", "[CLS] a b [SEP] a b c [SEP]"),
        ("a b c d e", "a b c d", "[CLS] a b c [SEP] a b [SEP]"),
    ],
)
def test_the_longer_of_a_pair_is_cut_first(
    bert: ModelTokenizer, first: str, second: str | None, kept: str
) -> None:
    seconds = [second] if second is not None else []
    (made,) = encode(bert, [first], 8, seconds=seconds, truncate=True)
    assert words(bert, made) == kept
    assert len(made.types) == len(made.ids)


def test_what_is_too_long_is_named_unless_it_may_be_cut(bert: ModelTokenizer) -> None:
    with pytest.raises(InvalidArgument, match="text 1 has 5 tokens; the model takes 4") as caught:
        encode(bert, ["a", "a b c"], 4)
    assert caught.value.details == {"limit": 4, "tokens": 5, "param": "input"}
    with pytest.raises(InvalidArgument, match="text 0 has 6"):
        encode(bert, [[5] * 6], 4)
    assert encode(bert, [[5] * 6, "a"], 4, truncate=True)[0] == Tokens([5] * 4, [0] * 4)


def test_scores() -> None:
    assert scores.cosine([1, 2], [2, 4]) == pytest.approx(1)
    assert scores.cosine([1, 0], [0, 1]) == scores.cosine([0, 0], [1, 1]) == 0
    assert [scores.sigmoid(x) for x in (-800, 0, 800)] == pytest.approx([0, 0.5, 1])
    assert scores.probabilities([900.0, 900.0], exclusive=True) == [0.5, 0.5]
    assert scores.probabilities([0.0, 800.0], exclusive=False) == [0.5, 1.0]
    assert scores.ranked([0.1, 0.9, 0.1, 0.5], 3) == [(1, 0.9), (3, 0.5), (0, 0.1)]
