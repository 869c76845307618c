"""From the metadata of a GGUF file to a ``tokenizers.Tokenizer``: byte-level BPE.

The pre-tokenizers are those that the models were trained with, as llama.cpp names them
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from llmos.ipc.errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

PLAIN = frozenset(("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2"))
DIGITS = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell"))
LLAMA3 = frozenset(("llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe"))
QWEN2 = frozenset(("qwen2", "deepseek-r1-qwen", "stablelm2"))
IGNORE_MERGES = frozenset(("llama3", "llama-v3", "llama-bpe"))

CONTROL, USER_DEFINED = 3, 4


def checked(problem: str, make: Callable[[], T]) -> T:
    """What ``make`` returns; InvalidArgument with the ``problem`` where the tokenizers library fails."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise InvalidArgument(f"{problem}: {error}") from None


def to_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata.

    NotSupported names a tokenizer or pre-tokenizer that is not known here; InvalidArgument says what is
    missing or does not fit.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise NotSupported(f"tokenizer {model!r} cannot be read from a GGUF file; byte-level BPE (gpt2) can")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    tokens, merges = _strings(metadata, "tokenizer.ggml.tokens"), _merges(metadata)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    bpe = checked(
        "the tokenizer's merges do not fit its vocabulary",
        lambda: models.BPE(vocabulary, merges, ignore_merges=pre in IGNORE_MERGES),
    )
    tokenizer = Tokenizer(bpe)
    _set_pre_tokenizer(tokenizer, pre)
    tokenizer.decoder = decoders.ByteLevel()
    _set_post_processor(tokenizer, metadata, tokens)
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [tokens[id] for id, kind in enumerate(kinds[: len(tokens)]) if kind == wanted]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return tokenizer


def _set_pre_tokenizer(tokenizer: Tokenizer, pre: str) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in PLAIN:
        tokenizer.pre_tokenizer = plain
    elif pre in DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain])
    elif pre in LLAMA3:
        tokenizer.pre_tokenizer = split(LLAMA3_PATTERN)
    elif pre in QWEN2:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = split(QWEN2_PATTERN)
    else:
        known = ", ".join(sorted(PLAIN | DIGITS | LLAMA3 | QWEN2))
        raise NotSupported(f"pre-tokenizer {pre!r} is not known; there is: {known}")


def _set_post_processor(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    from tokenizers import processors

    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token", False) or bos is None:
        return
    if not isinstance(bos, int) or not 0 <= bos < len(tokens):
        raise InvalidArgument(f"the token id {bos} that begins a text is not in the vocabulary")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B"], special_tokens=[(tokens[bos], bos)]
    )


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise InvalidArgument(f"the GGUF file has no {key}")
    return value


def _merges(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space:
            raise InvalidArgument(f"the merge {merge!r} is no pair")
        pairs.append((left, right))
    return pairs
