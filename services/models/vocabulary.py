"""Tokenizers of folders that have no ``tokenizer.json``: WordPiece (BERT) and byte-level BPE (RoBERTa)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos.ipc.errors import InvalidArgument, IOFailure
from llmos.services.models.convert import checked

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ("vocab.txt", "vocab.json", "merges.txt")
MAX_FILE = 64 << 20


def from_vocabulary(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a folder's vocabulary files and its ``tokenizer_config.json``.

    InvalidArgument where there are none, or they do not fit each other.
    """
    for name in FILES:
        if (path := folder / name).exists() and path.stat().st_size > MAX_FILE:
            raise InvalidArgument(f"{path} exceeds {MAX_FILE} bytes")
    if (folder / "vocab.txt").exists():
        return _word_piece(folder / "vocab.txt", config)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _byte_pairs(folder, config)
    raise InvalidArgument(
        f"{folder} has neither tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt"
    )


def _word_piece(path: Path, config: dict[str, Any]) -> Tokenizer:
    """As BertTokenizer: https://github.com/google-research/bert/blob/master/tokenization.py."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise IOFailure(f"cannot read {path}: {error.strerror}") from None
    vocabulary = {line.rstrip("\n"): id for id, line in enumerate(lines)}
    unknown, first, last = (_name(config, key) for key in ("unk_token", "cls_token", "sep_token"))
    _require(vocabulary, path, unknown, first, last)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = [_name(config, key) for key in _SPECIAL]
    tokenizer.add_special_tokens([name for name in special if name in vocabulary])
    return tokenizer


def _byte_pairs(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """As RobertaTokenizer, or GPT-2's where the vocabulary has no token that begins a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    read = lambda: models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))  # noqa: E731
    vocabulary, merges = checked(f"the vocabulary in {folder} is damaged", read)
    bpe = checked(f"the merges in {folder} do not fit", lambda: models.BPE(vocabulary, merges))
    spaced = bool(config.get("add_prefix_space", False))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    if "<s>" in vocabulary and "</s>" in vocabulary:
        tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", vocabulary["</s>"]),
            ("<s>", vocabulary["<s>"]),
            trim_offsets=True,
            add_prefix_space=spaced,
        )
    special = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>")
    tokenizer.add_special_tokens([name for name in special if name in vocabulary])
    return tokenizer


_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def _name(config: dict[str, Any], key: str) -> str:
    """A special token, written as text or as a table with its text."""
    value = config.get(key) or _SPECIAL[key]
    return str(value.get("content", "") if isinstance(value, dict) else value)


def _require(vocabulary: dict[str, int], path: Path, *tokens: str) -> None:
    for token in tokens:
        if token not in vocabulary:
            raise InvalidArgument(f"{path} has no token {token!r}")
