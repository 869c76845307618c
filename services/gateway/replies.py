"""The JSON that a client reads: whole answers, and the pieces of a stream. Pure."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llmos.services.models.messages import Done, Text

encode = msgspec.json.encode


def usage(ends: list[Done], n: int) -> dict[str, Any]:
    """Tokens of all choices; a prompt that ``n`` choices share counts once."""
    prompts = ends[::n]
    prompt = sum(end.usage.prompt_tokens for end in prompts)
    completion = sum(end.usage.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.usage.cached_tokens for end in prompts)},
    }


@dataclass(frozen=True)
class Shape:
    """How one endpoint writes its answers."""

    chat: bool
    model: str
    n: int
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    def _frame(self, choices: list[dict[str, Any]], *, piece: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if piece else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(self, ends: list[Done]) -> bytes:
        """The answer to a request that did not ask for a stream."""
        choices = [self._choice(index, end) for index, end in enumerate(ends)]
        return encode({**self._frame(choices, piece=False), "usage": usage(ends, self.n)})

    def _choice(self, index: int, end: Done) -> dict[str, Any]:
        said: dict[str, Any] = {"text": end.text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": end.text, "refusal": None}}
        return {"index": index, **said, "logprobs": None, "finish_reason": end.reason}

    def first(self, index: int) -> bytes | None:
        """What opens a choice of a stream."""
        if not self.chat:
            return None
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: Text) -> bytes:
        """A piece of the text of a choice."""
        said = {"delta": {"content": text.text}} if self.chat else {"text": text.text}
        return self._piece(index, said, None)

    def last(self, index: int, end: Done) -> bytes:
        """What closes a choice."""
        return self._piece(index, {"delta": {}} if self.chat else {"text": ""}, end.reason)

    def totals(self, ends: list[Done]) -> bytes:
        """The usage, after all choices."""
        return encode({**self._frame([], piece=True), "usage": usage(ends, self.n)})

    def _piece(self, index: int, said: dict[str, Any], reason: str | None) -> bytes:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        frame = self._frame([choice], piece=True)
        if self.include_usage:
            frame["usage"] = None
        return encode(frame)
