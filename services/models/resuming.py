"""Answers that go on from a saved task: its text is made again from its tokens. No I/O."""

from __future__ import annotations

import msgspec

from llmos.ipc import codec
from llmos.ipc.errors import AccessDenied, InvalidArgument
from llmos.services.models.detokenizer import detokenizer
from llmos.services.models.generation import Answer
from llmos.services.models.hosting import Model
from llmos.services.models.messages import Text
from llmos.services.scheduler.messages import Resume, Submit, TaskState


class TextState(msgspec.Struct, frozen=True):
    """What this service keeps with a task: its stop strings, and which model it was."""

    stop: list[str]
    fingerprint: str


def context(stop: list[str], model: Model) -> bytes:
    """The ``context`` of a task that is submitted."""
    return codec.encode(TextState(stop, model.fingerprint))


def check(state: TaskState, text: TextState, model: Model, tenant: str) -> None:
    """Refuse a task of another tenant, or of a model that has changed since."""
    if state.tenant != tenant:
        raise AccessDenied("this task was saved by another tenant")
    if state.model != model.spec.name or text.fingerprint != model.fingerprint:
        raise InvalidArgument(
            f"this task was saved with another model {state.model!r}: its weights or their type have changed"
        )
    name = state.adapter.partition("@")[0]
    if name and (name not in model.adapters or model.adapters[name].identity != state.adapter):
        raise InvalidArgument(
            f"this task was saved with the adapter {state.adapter!r}, which is not here with these weights: "
            f"llmos load {state.model}:{name} PATH"
        )
    if not 0 < state.prompt <= len(state.tokens) < state.limit:
        raise InvalidArgument(f"this saved task has {len(state.tokens)} tokens of {state.limit}")


def to_submit(name: str, state: TaskState) -> Submit:
    """The task as it goes on."""
    return Submit(
        model=state.model,
        tokens=state.tokens,
        max_tokens=state.limit - len(state.tokens),
        sampling=state.sampling,
        stop=state.stop,
        band=state.band,
        label=state.label,
        prompt=state.prompt,
        context=state.context,
        resume=Resume(name, state.computed),
        adapter=state.adapter,
    )


def answer(
    state: TaskState, text: TextState, model: Model, submit: Submit, now: float
) -> tuple[Answer, Text]:
    """The answer as it stands, and what it has said so far."""
    assert model.tokenizer is not None
    prompt, produced = state.tokens[: state.prompt], state.tokens[state.prompt :]
    found = Answer(
        msgspec.structs.replace(submit, tokens=prompt), text.stop, detokenizer(model.tokenizer, prompt), now
    )
    return found, found.feed(0, produced, now) or Text("", len(produced))
