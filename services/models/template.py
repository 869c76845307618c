"""Chat templates: Jinja from the model's files, so run in a sandbox with bounds on time and size.

The dialect is that of Hugging Face (https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmos.ipc.errors import InvalidArgument

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
MAX_TEMPLATE = 1 << 20
MAX_OUTPUT = 8 << 20
MAX_REPEAT = 1 << 20
MAX_SECONDS = 1.0

_WIDE = re.compile(r"\{[^}]*\d{5}")


class ChatTemplate:
    """A compiled template; ``source`` "" is ChatML. InvalidArgument if it does not compile."""

    def __init__(self, source: str = "", *, bos: str = "", eos: str = "") -> None:
        if len(source) > MAX_TEMPLATE:
            raise InvalidArgument(f"a chat template of {len(source)} characters exceeds {MAX_TEMPLATE}")
        self._environment = _Environment()
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = self._environment.from_string(source or CHATML)
        except (TemplateError, RecursionError) as error:
            raise InvalidArgument(f"the model's chat template is no valid template: {error}") from None

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The text of a conversation, ready for the model's answer.

        InvalidArgument where the template refuses it, fails, or exceeds its bounds.
        """
        self._environment.restart_clock()
        values = {"messages": messages, "tools": tools or None, "add_generation_prompt": True}
        parts, size = [], 0
        try:
            for part in self._template.generate(**values, **self._tokens):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT:
                    raise InvalidArgument(f"the chat template produced over {MAX_OUTPUT} characters")
        except TemplateError as error:
            raise InvalidArgument(f"the chat template refuses these messages: {error}") from None
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError) as error:
            raise InvalidArgument(f"the chat template fails on these messages: {error!r}") from None
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which also looks at the clock wherever a template looks something up or calls."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self._until = 0.0
        self.filters["tojson"] = _tojson
        # These make strings of any width from a number.
        for name in ("center", "format", "indent"):
            self.filters[name] = _bounded(self.filters[name])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def restart_clock(self) -> None:
        self._until = time.monotonic() + MAX_SECONDS

    def _check_clock(self) -> None:
        if time.monotonic() > self._until:
            raise InvalidArgument(f"the chat template ran for over {MAX_SECONDS:g} s")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._check_clock()
        if operator == "**" or (operator == "*" and _grows(left, right)):
            raise InvalidArgument("the chat template computes a value that is too large")
        if operator == "%" and isinstance(left, str):
            raise InvalidArgument("the chat template formats with %, which is not supported")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check_clock()
        self._check_format(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check_clock()
        self._check_format(obj, argument)
        return super().getitem(obj, argument)

    def _check_format(self, obj: Any, name: Any) -> None:
        # The sandbox wraps the method, so that its string is no longer to be seen when it is called.
        if isinstance(obj, str) and name in ("format", "format_map") and _WIDE.search(obj):
            raise InvalidArgument("the chat template formats to a width that is too large")

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_clock()
        if any(isinstance(a, int) and abs(a) > MAX_REPEAT for a in (*args, *kwargs.values())):
            raise InvalidArgument("the chat template calls with a number that is too large")
        return super().call(context, obj, *args, **kwargs)


def _grows(left: Any, right: Any) -> bool:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(sequence) * count > MAX_REPEAT
    return isinstance(left, int) and isinstance(right, int) and max(abs(left), abs(right)) > 1 << 63


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        numbers = [a for a in (*args, *kwargs.values()) if isinstance(a, int)]
        if any(abs(number) > MAX_REPEAT for number in numbers):
            raise InvalidArgument("the chat template asks for a width that is too large")
        return function(value, *args, **kwargs)

    return call


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # Not Jinja's own: that one escapes for HTML.
    if isinstance(indent, int) and indent > 64:
        raise InvalidArgument("the chat template asks for an indent over 64")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
