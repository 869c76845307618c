"""Tokens to text as they come: whole characters only, and in sum exactly what decoding all at once gives."""

from __future__ import annotations

import codecs
from typing import Protocol

from llmos.services.models.tokenizer import ModelTokenizer

CONTEXT = 6  # tokens before the first one that can change how it is written


class Detokenizer(Protocol):
    """The state of one answer."""

    def feed(self, tokens: list[int]) -> str:
        """The text that these tokens complete."""

    def finish(self) -> str:
        """What is left; bytes that never became a character are U+FFFD."""


def detokenizer(tokenizer: ModelTokenizer, prompt: list[int]) -> Detokenizer:
    """The detokenizer for an answer to ``prompt``."""
    if tokenizer.info.byte_level:
        return ByteDetokenizer(tokenizer)
    return WindowDetokenizer(tokenizer, prompt[-CONTEXT:])


class ByteDetokenizer:
    """For byte-level vocabularies: each token is some bytes, and UTF-8 says where a character ends."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: list[int]) -> str:
        bytes_of = self._tokenizer.bytes_of
        return self._utf8.decode(b"".join([bytes_of(token) for token in tokens]))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For all others: decode a window that starts before the new tokens, and take what it grew by.

    The method of text-generation-inference
    (https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/models/model.py).
    """

    def __init__(self, tokenizer: ModelTokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = 0
        self._read = len(context)

    def feed(self, tokens: list[int]) -> str:
        return "".join([self._feed_one(token) for token in tokens])

    def finish(self) -> str:
        known, text = self._texts()
        self._start = self._read = len(self._ids)
        return text[len(known) :]

    def _feed_one(self, token: int) -> str:
        self._ids.append(token)
        known, text = self._texts()
        if len(text) <= len(known) or text.endswith("�"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _texts(self) -> tuple[str, str]:
        """The window without and with the tokens that gave no text yet."""
        decode = self._tokenizer.decode
        return decode(self._ids[self._start : self._read]), decode(self._ids[self._start :])
