"""Chat templates: what transformers renders, and nothing that a template should not do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmos.ipc.errors import InvalidArgument
from llmos.services.models.template import ChatTemplate
from llmos.services.models.tokenizer import ModelTokenizer

USER = [{"role": "user", "content": "Hi"}]
RECORDED = json.loads((Path(__file__).parent / "tokens.json").read_text())["chat"]


@pytest.mark.model
def test_the_real_template_renders_as_in_transformers(smollm: ModelTokenizer) -> None:
    assert ChatTemplate(smollm.info.chat_template).render(RECORDED["messages"]) == RECORDED["text"]


def test_without_a_template_it_is_chatml() -> None:
    assert ChatTemplate().render(USER) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_it_has_what_templates_on_the_hub_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}\n"
        "{{ tools | tojson }}{{ strftime_now('%Y') | length }}{{ messages[0].content }}{{ eos_token }}"
    )
    text = ChatTemplate(source, bos="<s>", eos="</s>").render(USER, [{"a": "<ü>"}])
    assert text == '<s>[{"a": "<ü>"}]4Hi</s>'


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(InvalidArgument, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no valid template"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% include '/etc/passwd' %}",
        "{{ messages + 1 }}",
        "{{ messages[0].content.nothing.at.all }}",
    ],
)
def test_it_cannot_reach_out_of_its_sandbox(source: str) -> None:
    conversation: list[dict[str, Any]] = [dict(message) for message in USER]
    try:
        text = ChatTemplate(source).render(conversation)
    except InvalidArgument:
        text = ""
    assert text == ""
    assert conversation == USER


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages[0].x }}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' }}{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999 }}",
        "{{ [0] * 999999999 }}",
        "{{ 9 ** 999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'x'.ljust(999999999) }}",
        "{{ 'x' | center(999999999) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ range(999999999) | list }}",
        "{{ messages | tojson(indent=999999999) }}",
    ],
)
def test_it_is_stopped_where_it_takes_too_much_time_or_space(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidArgument):
        ChatTemplate(source).render(USER)
    assert time.monotonic() - began < 5
