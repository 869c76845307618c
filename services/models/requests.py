"""A request checked, and turned into a task for the scheduler. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable

from llmos.drivers.sdk.checks import BIAS_LIMIT as MAX_BIASES
from llmos.drivers.sdk.messages import LoadedModel, Sampling
from llmos.ipc.errors import AccessDenied, InvalidArgument
from llmos.ipc.grant import Band, Grant
from llmos.services.models.messages import ChatMessage, Generation
from llmos.services.scheduler.messages import Submit

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_TOP_K = 1 << 20
MAX_SEED = 1 << 32

# Name, least and greatest allowed value.
RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_k", 0, MAX_TOP_K),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
BIAS_LIMIT = 100.0


def check_generation(generation: Generation) -> None:
    """InvalidArgument, naming the parameter in ``details``, unless every value is in its range."""
    for name, least, greatest in RANGES:
        value = getattr(generation, name)
        # Written so that a NaN is refused, too.
        if not least <= value <= greatest:
            _refuse(name, f"{name} must be {least:g} to {greatest:g}, not {value:g}")
    if generation.top_p == 0.0:
        _refuse("top_p", "top_p must be over 0")
    if generation.max_tokens < 0:
        _refuse("max_tokens", f"max_tokens must be 0 or more, not {generation.max_tokens}")
    if len(generation.stop) > MAX_STOPS:
        _refuse("stop", f"at most {MAX_STOPS} stop strings, not {len(generation.stop)}")
    for stop in generation.stop:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            _refuse("stop", f"a stop string has 1 to {MAX_STOP_CHARS} characters, not {len(stop)}")
    if len(generation.logit_bias) > MAX_BIASES:
        _refuse("logit_bias", f"at most {MAX_BIASES} logit biases, not {len(generation.logit_bias)}")
    for bias in generation.logit_bias.values():
        if not -BIAS_LIMIT <= bias <= BIAS_LIMIT:
            _refuse("logit_bias", f"a logit bias must be {-BIAS_LIMIT:g} to {BIAS_LIMIT:g}, not {bias:g}")


def check_grant(grant: Grant, generation: Generation) -> None:
    """AccessDenied unless the caller may run in this band and ask for this many tokens."""
    check_band(grant, generation.band)
    if 0 < grant.max_tokens < generation.max_tokens:
        raise AccessDenied(
            f"this capability allows max_tokens up to {grant.max_tokens}, not {generation.max_tokens}",
            exceeded="max_tokens",
        )


def check_band(grant: Grant, band: Band) -> None:
    """AccessDenied unless the caller may run in this band."""
    if not grant.may_run_in(band):
        raise AccessDenied(f"this capability allows the band {grant.band!r} at most, not {band!r}")


def check_decoder(model: LoadedModel) -> None:
    """InvalidArgument for a model that generates no text."""
    if model.kind != "decoder":
        raise InvalidArgument(f"{model.model} is an encoder: it generates no text, use models.embed")


def context_limit(model: LoadedModel) -> int:
    """How many tokens prompt and answer may have together."""
    return min(model.max_context, model.pages * model.page_tokens)


def check_length(text: str, longest: int, model: LoadedModel) -> None:
    """InvalidArgument for a text that cannot fit, before time is spent to tokenize it; ``longest`` is the
    length of the vocabulary's longest token."""
    least, limit = -(-len(text) // longest), context_limit(model)
    if least >= limit:
        raise InvalidArgument(
            f"the prompt has {least} tokens or more; {model.model} takes {limit} with its answer: shorten it",
            limit=limit,
            tokens=least,
        )


def check_prompt(tokens: list[int], model: LoadedModel) -> None:
    """InvalidArgument unless the prompt has tokens, all of the vocabulary, and leaves room for one more."""
    limit = context_limit(model)
    if not tokens:
        _refuse("prompt", "the prompt is empty")
    if len(tokens) >= limit:
        raise InvalidArgument(
            f"the prompt has {len(tokens)} tokens; {model.model} takes {limit} with its answer: shorten it",
            limit=limit,
            tokens=len(tokens),
        )
    if not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        _refuse("prompt", f"the prompt holds a token id outside 0 to {model.vocab_size - 1}")


def to_submit(
    generation: Generation,
    tokens: list[int],
    model: LoadedModel,
    grant: Grant,
    *,
    stop: Iterable[int] = (),
    label: str = "",
) -> Submit:
    """The task for a checked request; ``stop`` are the tokenizer's own stop tokens, besides the model's.

    InvalidArgument with ``limit`` and ``tokens`` in its details where it exceeds the model's context;
    AccessDenied where it exceeds the caller's rights.
    """
    check_generation(generation)
    check_grant(grant, generation)
    check_prompt(tokens, model)
    for id in generation.logit_bias:
        if not 0 <= id < model.vocab_size:
            _refuse("logit_bias", f"token id {id} in logit_bias is outside 0 to {model.vocab_size - 1}")
    return Submit(
        model=model.model,
        tokens=tokens,
        max_tokens=_max_tokens(generation, len(tokens), model, grant),
        sampling=_sampling(generation),
        stop=[] if generation.ignore_eos else sorted({*model.stop_tokens, *stop}),
        band=generation.band,
        label=label,
    )


def _max_tokens(generation: Generation, prompt: int, model: LoadedModel, grant: Grant) -> int:
    """What was asked for, or as much as model and grant allow."""
    wanted, limit = generation.max_tokens, context_limit(model)
    if not wanted:
        own = grant.max_pages * model.page_tokens or limit
        return max(1, min(limit - prompt, own - prompt, grant.max_tokens or limit))
    if prompt + wanted > limit:
        raise InvalidArgument(
            f"{prompt} tokens of prompt and {wanted} of max_tokens exceed the context of {limit}: "
            f"ask for {limit - prompt} at most",
            limit=limit,
            tokens=prompt + wanted,
        )
    return wanted


def _sampling(generation: Generation) -> Sampling:
    seed = random.getrandbits(32) if generation.seed is None else generation.seed % MAX_SEED
    return Sampling(
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        presence_penalty=generation.presence_penalty,
        frequency_penalty=generation.frequency_penalty,
        seed=seed,
        logit_bias=generation.logit_bias,
    )


def template_message(message: ChatMessage) -> dict[str, object]:
    """A message as chat templates expect it: absent fields absent, content always a string."""
    values: dict[str, object] = {"role": message.role, "content": message.content or ""}
    for name in ("name", "tool_calls", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            values[name] = value
    return values


def check_messages(messages: list[ChatMessage]) -> None:
    """InvalidArgument for an empty or an endless conversation."""
    if not 0 < len(messages) <= MAX_MESSAGES:
        _refuse("messages", f"a conversation has 1 to {MAX_MESSAGES} messages, not {len(messages)}")


def _refuse(parameter: str, message: str) -> None:
    raise InvalidArgument(message, param=parameter)
