"""Texts as encoders take them: token ids and types, alone or in pairs, whole or truncated. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmos.ipc.errors import InvalidArgument
from llmos.services.models.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

Input = str | list[int]


class Tokens(NamedTuple):
    """One text, or one pair; ``types`` has a type for each id."""

    ids: list[int]
    types: list[int]


def encode(
    tokenizer: ModelTokenizer,
    texts: Sequence[Input],
    limit: int,
    *,
    seconds: Sequence[str] = (),
    truncate: bool = False,
) -> list[Tokens]:
    """Each text with the special tokens that the model expects; token ids are taken as they are.

    With ``seconds`` the texts are strings, and each makes a pair with its second. One of more than ``limit``
    tokens is cut at its end if ``truncate`` is set, of a pair the longer first; else it is refused by
    InvalidArgument with ``limit`` and ``tokens``.
    """
    if seconds:
        pairs = list(zip(texts, seconds, strict=True))
        return [_fit(tokenizer, made, limit, truncate, i) for i, made in enumerate(_batch(tokenizer, pairs))]
    strings = iter(_batch(tokenizer, [text for text in texts if isinstance(text, str)]))
    return [
        _fit(tokenizer, next(strings), limit, truncate, number)
        if isinstance(text, str)
        else _as_it_is(text, limit, truncate, number)
        for number, text in enumerate(texts)
    ]


def _batch(tokenizer: ModelTokenizer, texts: Sequence[object]) -> list[tuple[object, Encoding]]:
    return list(zip(texts, tokenizer.raw.encode_batch(texts, add_special_tokens=True)))


def _as_it_is(ids: list[int], limit: int, truncate: bool, number: int) -> Tokens:
    if len(ids) > limit and not truncate:
        raise _too_long(number, len(ids), limit)
    return Tokens(ids[:limit], [0] * min(len(ids), limit))


def _fit(
    tokenizer: ModelTokenizer, made: tuple[object, Encoding], limit: int, truncate: bool, number: int
) -> Tokens:
    text, encoding = made
    if len(encoding.ids) > limit:
        if not truncate:
            raise _too_long(number, len(encoding.ids), limit)
        encoding = _cut(tokenizer, text, limit)
    return Tokens(encoding.ids, encoding.type_ids)


def _cut(tokenizer: ModelTokenizer, text: object, limit: int) -> Encoding:
    """Encode without special tokens, cut, and let the tokenizer put them around what is left."""
    parts = text if isinstance(text, tuple) else (text,)
    encodings = [tokenizer.raw.encode(part, add_special_tokens=False) for part in parts]
    room = limit - tokenizer.raw.num_special_tokens_to_add(len(parts) == 2)
    sizes = _shares([len(encoding.ids) for encoding in encodings], max(0, room))
    for encoding, size in zip(encodings, sizes):
        encoding.truncate(size)
    cut: Encoding = tokenizer.raw.post_process(encodings[0], encodings[1] if len(encodings) > 1 else None)
    return cut


def _shares(sizes: list[int], room: int) -> list[int]:
    """What each of one or two texts may keep: the shorter all of it, if that is no more than half."""
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    first, second = sizes
    if first <= second:
        first = min(first, max(room // 2, room - second))
        return [first, min(second, room - first)]
    second = min(second, max(room // 2, room - first))
    return [min(first, room - second), second]


def _too_long(number: int, tokens: int, limit: int) -> InvalidArgument:
    return InvalidArgument(
        f"text {number} has {tokens} tokens; the model takes {limit}: shorten it, or set truncate",
        limit=limit,
        tokens=tokens,
        param="input",
    )
