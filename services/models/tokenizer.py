"""A model's tokenizer: read from its GGUF file or folder once, kept converted in the cache after that."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from llmos.ipc import paths
from llmos.ipc.errors import InvalidArgument, IOFailure, LLMOSError
from llmos.services.models import gguf, vocabulary
from llmos.services.models.convert import checked, to_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1  # of what is kept in the cache; raise it when the conversion changes
MAX_FILE = 256 << 20


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What else there is to know: special ids, and the chat template ("" if the model has none).

    ``byte_level`` says that each token stands for bytes by itself, whatever its neighbours are.
    """

    bos: str = ""
    eos: str = ""
    stop: list[int] = []
    chat_template: str = ""
    byte_level: bool = False


class ModelTokenizer:
    """Text to token ids and back."""

    def __init__(self, tokenizer: Tokenizer, info: TokenizerInfo) -> None:
        self.raw = tokenizer
        self.info = info
        self.special = frozenset(
            id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def longest(self) -> int:
        """The length of the longest token: no text has fewer tokens than its length divided by this."""
        return max(len(token) for token in self.raw.get_vocab())

    def encode(self, text: str, *, template: bool = False) -> list[int]:
        """Token ids; a rendered ``template`` brings its own special tokens, other text is given them."""
        ids: list[int] = self.raw.encode(text, add_special_tokens=not template).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text, without special tokens; InvalidArgument for an id that is not in the vocabulary."""
        size = self.raw.get_vocab_size()
        for id in ids:
            if not 0 <= id < size:
                raise InvalidArgument(f"token id {id} is not in the vocabulary of {size}")
        text: str = self.raw.decode(ids, skip_special_tokens=True)
        return text

    def bytes_of(self, id: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary stands for; none for a special one."""
        found = self._bytes.get(id)
        if found is None:
            token = "" if id in self.special else self.raw.id_to_token(id) or ""
            found = self._bytes[id] = _to_bytes(token)
        return found


def _to_bytes(token: str) -> bytes:
    try:
        return bytes([BYTES[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of GPT-2 for the 256 bytes
    (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = _byte_alphabet()


def load(source: Path, cache: Path) -> ModelTokenizer:
    """The tokenizer of the model at ``source``, a GGUF file or a folder; converted under ``cache`` if new.

    Raises InvalidArgument or NotSupported naming what is wrong with it, IOFailure where it cannot be read.
    """
    folder = cache / "tokenizers" / _fingerprint(source)
    kept = _read_kept(folder)
    if kept is not None:
        return kept
    tokenizer = _from_folder(source) if source.is_dir() else _from_gguf(source)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths.write_private(folder / "tokenizer.json", tokenizer.raw.to_str().encode())
    # The information is written last: where it lies, the tokenizer is complete.
    paths.write_private(folder / "info.json", msgspec.json.encode(tokenizer.info))
    return tokenizer


def _fingerprint(source: Path) -> str:
    """Changes with the file, or with any of the small files that make a folder's tokenizer."""
    names = [source] if not source.is_dir() else [source / name for name in _FOLDER_FILES]
    digest = hashlib.sha256(f"{VERSION}".encode())
    try:
        for path in names:
            if path.exists():
                info = path.stat()
                digest.update(f"|{path.resolve()}|{info.st_size}|{info.st_mtime_ns}".encode())
            elif path is source:
                raise IOFailure(f"there is no model at {source}")
    except OSError as error:
        raise IOFailure(f"cannot read {source}: {error.strerror}") from None
    return digest.hexdigest()[:32]


def _read_kept(folder: Path) -> ModelTokenizer | None:
    try:
        info = msgspec.json.decode((folder / "info.json").read_bytes(), type=TokenizerInfo)
        return ModelTokenizer(_parse(folder / "tokenizer.json"), info)
    except (OSError, msgspec.DecodeError, LLMOSError):
        return None


def _from_gguf(path: Path) -> ModelTokenizer:
    metadata = gguf.read_metadata(path)
    tokenizer = to_tokenizer(metadata)

    def special(name: str) -> int | None:
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return id if isinstance(id, int) and id < tokenizer.get_vocab_size() else None

    bos, eos = special("bos"), special("eos")
    stop = {id for id in (eos, special("eot"), special("eom")) if id is not None}
    info = TokenizerInfo(
        bos=(tokenizer.id_to_token(bos) or "") if bos is not None else "",
        eos=(tokenizer.id_to_token(eos) or "") if eos is not None else "",
        stop=sorted(stop),
        chat_template=str(metadata.get("tokenizer.chat_template", "")),
        byte_level=True,
    )
    return ModelTokenizer(tokenizer, info)


_FOLDER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    *vocabulary.FILES,
)


def _from_folder(folder: Path) -> ModelTokenizer:
    config = _json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    tokenizer = _parse(path) if path.exists() else vocabulary.from_vocabulary(folder, config)
    bos, eos = _token(config.get("bos_token")), _token(config.get("eos_token"))
    stop = set(_ids(_json(folder / "generation_config.json")) or _ids(_json(folder / "config.json")))
    eos_id = tokenizer.token_to_id(eos) if eos else None
    if eos_id is not None:
        stop.add(eos_id)
    info = TokenizerInfo(
        bos=bos,
        eos=eos,
        stop=sorted(stop),
        chat_template=_folder_template(folder, config),
        byte_level=_is_byte_level(tokenizer),
    )
    return ModelTokenizer(tokenizer, info)


def _folder_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        return _read(path).decode("utf-8", "replace")
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default") or ""
    return str(template)


def _parse(path: Path) -> Tokenizer:
    # Set before the library starts threads that nobody here uses.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    text = _read(path).decode("utf-8", "replace")
    return checked(f"{path} is no tokenizer", lambda: Tokenizer.from_str(text))


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return [step.get("type") for step in steps] == ["ByteLevel"]


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE:
            raise InvalidArgument(f"{path} exceeds {MAX_FILE} bytes")
        return path.read_bytes()
    except OSError as error:
        raise IOFailure(f"cannot read {path}: {error.strerror}") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise InvalidArgument(f"{path} is no JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _token(value: Any) -> str:
    """A special token, written as text or as a table with its text."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _ids(config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    return [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
