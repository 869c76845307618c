"""The message handlers of the models service."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmos.drivers.sdk.messages import OpenTask, TaskOpened
from llmos.ipc import calls, codec, paths
from llmos.ipc.errors import LLMOSError
from llmos.ipc.grant import Origin
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.services import adapters, manifest, saved
from llmos.services.models import requests, resuming
from llmos.services.models.detokenizer import detokenizer
from llmos.services.models.encoding import Encodings
from llmos.services.models.generation import Answer
from llmos.services.models.hosting import Model
from llmos.services.models.loader import Loader
from llmos.services.models.messages import (
    Chat,
    Classify,
    Complete,
    Detokenize,
    Embed,
    Generation,
    Load,
    LoadAdapter,
    ModelList,
    Park,
    Rerank,
    Resume,
    TokenIds,
    Tokenize,
    Unload,
    UnloadAdapter,
    Wake,
)
from llmos.services.models.streams import Streams
from llmos.services.scheduler.messages import TaskState

Tokens = list[int]

OPEN_SECONDS = 30.0
SYSTEM = "system"  # the tenant of the services themselves


class ModelsServer(Server):
    """From text to tasks and from tokens to text; keeps the manifest's models loaded."""

    name = "models"
    watch = True

    def __init__(self, run: Path | None = None, cache: Path | None = None) -> None:
        super().__init__(run)
        self._loader = Loader(self, manifest.read_running(run), cache or paths.cache_dir())
        self._streams = Streams(self)
        self._encodings = Encodings(self)

    def start(self) -> None:
        self._loader.start()

    def stop(self) -> None:
        self._loader.close()
        self._encodings.close()

    def on_up(self, name: str, connection: int) -> None:
        if name == "scheduler":
            self._streams.attach()
        self._loader.on_up(name, connection)

    def on_down(self, name: str, connection: int) -> None:
        self._loader.on_down(name, connection)

    def on_kernel_restart(self) -> None:
        self._loader.forget_all()

    @method
    def chat(self, request: Chat, call: Incoming) -> Later:
        """A stream of ``Text``, ended by ``Done``."""
        requests.check_messages(request.messages)
        messages = [requests.template_message(message) for message in request.messages]

        def prompt(model: Model) -> Tokens:
            assert model.template is not None
            return _encode(model, model.template.render(messages, request.tools), template=True)

        return self._generate(request.model, request.generation, prompt, call)

    @method
    def complete(self, request: Complete, call: Incoming) -> Later:
        """A stream of ``Text``, ended by ``Done``."""

        def prompt(model: Model) -> Tokens:
            if not isinstance(request.prompt, str):
                return request.prompt
            return _encode(model, request.prompt, template=False)

        return self._generate(request.model, request.generation, prompt, call)

    @method
    def embed(self, request: Embed, call: Incoming) -> Later:
        """Answers ``Embedded``."""
        requests.check_band(call.origin.grant, request.band)
        return self._when(request.model, call, lambda model: self._encodings.embed(request, model, call))

    @method
    def rerank(self, request: Rerank, call: Incoming) -> Later:
        """Answers ``Ranked``."""
        requests.check_band(call.origin.grant, request.band)
        return self._when(request.model, call, lambda model: self._encodings.rerank(request, model, call))

    @method
    def classify(self, request: Classify, call: Incoming) -> Later:
        """Answers ``Classified``."""
        requests.check_band(call.origin.grant, request.band)
        return self._when(request.model, call, lambda model: self._encodings.classify(request, model, call))

    @method
    def list(self, request: None, call: Incoming) -> ModelList:
        """The models that the caller may use; services see all."""
        lines = [line for model in self._loader.models.values() for line in model.lines()]
        return ModelList([line for line in lines if _may_see(call.origin, line.name)])

    @method
    def load(self, request: Load, call: Incoming) -> Later:
        """Chunks are ``LoadProgress``, the end is ``ModelLine``."""
        call.origin.check_model(request.model)
        self._loader.load(self._loader.model(request.model), call)
        return Later()

    @method
    def unload(self, request: Unload, call: Incoming) -> Later:
        call.origin.check_model(request.model)
        self._loader.unload(self._loader.model(request.model), call)
        return Later()

    @method
    def load_adapter(self, request: LoadAdapter, call: Incoming) -> Later:
        """The reply is ``ModelLine``, once requests can name it."""
        model, name = adapters.split(request.model)

        def load(model: Model) -> None:
            self._loader.adapters.load(model, name, request.source, call)

        return self._once_ready(request.model, self._loader.model(model), call, load)

    @method
    def unload_adapter(self, request: UnloadAdapter, call: Incoming) -> Later:
        """The reply comes once its place is free."""
        model, name = adapters.split(request.model)

        def unload(model: Model) -> None:
            self._loader.adapters.unload(model, name, call)

        return self._once_ready(request.model, self._loader.model(model), call, unload)

    @method
    def park(self, request: Park, call: Incoming) -> Later:
        """Answers ``ModelLine``, once the model has no tasks and is parked."""
        call.origin.check_model(request.model)
        self._loader.park(self._loader.model(request.model), call)
        return Later()

    @method
    def wake(self, request: Wake, call: Incoming) -> Later:
        """Answers ``ModelLine``, once the model is on its device."""
        call.origin.check_model(request.model)
        self._loader.wake(self._loader.model(request.model), call)
        return Later()

    @method
    def tokenize(self, request: Tokenize, call: Incoming) -> Later:
        """``TokenIds``, with the special tokens that begin a text."""

        def reply(model: Model) -> None:
            assert model.tokenizer is not None
            call.reply(TokenIds(model.tokenizer.encode(request.text)))

        return self._when(request.model, call, reply, for_driver=False)

    @method
    def detokenize(self, request: Detokenize, call: Incoming) -> Later:
        """The text as a string."""

        def reply(model: Model) -> None:
            assert model.tokenizer is not None
            call.reply(model.tokenizer.decode(request.tokens))

        return self._when(request.model, call, reply, for_driver=False)

    @method
    def resume(self, request: Resume, call: Incoming) -> Later:
        """A stream of ``Text``, the first of which is what was said before, ended by ``Done``."""
        with saved.open_file(request.name) as file:
            header, _ = saved.read_header(file)

        def begin(model: Model) -> None:
            def opened(reply: calls.Answer) -> None:
                try:
                    if reply.error is not None:
                        raise reply.error
                    state = codec.decode(codec.decode(reply.body, TaskOpened).state, TaskState)
                    self._go_on(request.name, state, model, call)
                except LLMOSError as error:
                    call.fail(error)

            body = OpenTask(request.name, call.origin.grant.tenant)
            self.call(f"driver.{model.spec.driver}.open", body, opened, timeout=OPEN_SECONDS)

        # Who it belongs to, and what it needs, is known when it was opened.
        return self._once_ready("", self._loader.model(header.model), call, begin)

    def _go_on(self, name: str, state: TaskState, model: Model, call: Incoming) -> None:
        text = codec.decode(state.context, resuming.TextState)
        call.origin.check_model(adapters.served(state.model, state.adapter))
        resuming.check(state, text, model, call.origin.grant.tenant)
        submit, now = resuming.to_submit(name, state), time.monotonic()
        answer, said = resuming.answer(state, text, model, submit, now)
        call.chunk(said)
        if answer.stopped:
            call.end(answer.cut(now))
        else:
            self._streams.begin(call, submit, answer, stream=True)

    def _generate(
        self, name: str, generation: Generation, prompt: Callable[[Model], Tokens], call: Incoming
    ) -> Later:
        requests.check_generation(generation)
        requests.check_grant(call.origin.grant, generation)

        def begin(model: Model) -> None:
            assert model.loaded is not None
            assert model.tokenizer is not None
            requests.check_decoder(model.loaded)
            tokens, grant = prompt(model), call.origin.grant
            adapter = model.adapter(adapters.split(name)[1])
            stop = model.tokenizer.info.stop
            submit = requests.to_submit(
                generation, tokens, model.loaded, grant, stop=stop, label=call.head.method
            )
            context = resuming.context(generation.stop, model)
            submit = msgspec.structs.replace(submit, context=context, adapter=adapter)
            text = detokenizer(model.tokenizer, tokens)
            answer = Answer(submit, generation.stop, text, time.monotonic())
            self._streams.begin(call, submit, answer, stream=generation.stream)

        return self._when(name, call, begin)

    def _when(
        self, name: str, call: Incoming, act: Callable[[Model], None], *, for_driver: bool = True
    ) -> Later:
        """Act once the model is ready, or fail the call with what keeps it from being so."""
        call.origin.check_model(name)
        base, adapter = adapters.split(name)
        model = self._loader.model(base)
        if adapter not in ("", *model.adapters):
            model.adapter(adapter)
        return self._once_ready(name, model, call, act, for_driver=for_driver)

    def _once_ready(
        self,
        name: str,
        model: Model,
        call: Incoming,
        act: Callable[[Model], None],
        *,
        for_driver: bool = True,
    ) -> Later:
        """As ``_when``, for a caller who may use ``name``; if it is empty, ``act`` checks their rights."""
        if name:
            call.origin.check_model(name)

        def told(error: LLMOSError | None) -> None:
            call.on_cancel = None
            try:
                if error is not None:
                    raise error
                act(model)
            except LLMOSError as failure:
                call.fail(failure)

        call.on_cancel = lambda: model.forget(told)
        model.wait(told, for_driver=for_driver)
        return Later()


def _encode(model: Model, text: str, *, template: bool) -> Tokens:
    assert model.loaded is not None
    assert model.tokenizer is not None
    requests.check_length(text, model.tokenizer.longest, model.loaded)
    return model.tokenizer.encode(text, template=template)


def _may_see(origin: Origin, model: str) -> bool:
    return origin.grant.tenant == SYSTEM or origin.grant.may_use(model)
