"""A key for each tenant and purpose, and sealed bytes for everything that leaves RAM. Pure.

Sealed bytes are ``b"LLMS"``, the format version (1 byte), the nonce (12 bytes), and the AES-256-GCM
ciphertext with its tag (16 bytes longer than the plaintext). Header and associated data are authenticated.
Nonces are random, so one key seals 2**32 messages at most (NIST SP 800-38D, section 8.3).
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from llmos.ipc.errors import InvalidArgument, IOFailure

MASTER_BYTES = KEY_BYTES = 32
MAGIC = b"LLMS"
VERSION = 1
NONCE_BYTES = 12
TAG_BYTES = 16
HEADER_BYTES = len(MAGIC) + 1 + NONCE_BYTES
OVERHEAD = HEADER_BYTES + TAG_BYTES


def tenant_key(master: bytes, tenant: str, purpose: str) -> bytes:
    """The 32-byte key of a tenant for a purpose ("pages", "tasks", "journal"), by HKDF-SHA256 (RFC 5869)."""
    if len(master) != MASTER_BYTES:
        raise InvalidArgument(f"a master key has {MASTER_BYTES} bytes, not {len(master)}")
    if not tenant or not purpose:
        raise InvalidArgument("a key is derived for a tenant and a purpose")
    # Lengths first, so that no two pairs of names give the same input.
    parts = [part.encode() for part in ("llmos key v1", purpose, tenant)]
    info = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return HKDF(SHA256(), KEY_BYTES, None, info).derive(master)


def seal(key: bytes, plaintext: bytes | memoryview, associated: bytes = b"") -> bytes:
    """Plaintext as sealed bytes; ``associated`` must be given again to open them."""
    header = MAGIC + bytes([VERSION])
    nonce = secrets.token_bytes(NONCE_BYTES)
    return header + nonce + AESGCM(_key(key)).encrypt(nonce, plaintext, header + associated)


def unseal(key: bytes, sealed: bytes, associated: bytes = b"") -> bytes:
    """The plaintext of sealed bytes; IOFailure if they were changed, or sealed otherwise."""
    if len(sealed) < OVERHEAD or sealed[: len(MAGIC)] != MAGIC:
        raise IOFailure("these are no sealed bytes")
    if sealed[len(MAGIC)] != VERSION:
        raise IOFailure(f"sealed by format version {sealed[len(MAGIC)]}; this program reads {VERSION}")
    header, nonce = sealed[: len(MAGIC) + 1], sealed[len(MAGIC) + 1 : HEADER_BYTES]
    try:
        return AESGCM(_key(key)).decrypt(nonce, sealed[HEADER_BYTES:], header + associated)
    except InvalidTag:
        raise IOFailure("the sealed bytes were changed, or belong to another tenant or place") from None


def _key(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise InvalidArgument(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    return key
