"""Every bound on what is read from a socket, in one place."""

from __future__ import annotations

HEADER_BYTES = 512
BODY_BYTES = 8 << 20
FRAME_BYTES = 32 << 20
FRAMES = 16
TOKEN_BYTES = 16 << 10
DEPTH = 32
ITEMS = 1 << 20

CONNECTIONS = 4096
HANDLES_PER_CONNECTION = 4096
CALLS_PER_CONNECTION = 8192
CALLS_PER_SERVICE = 16384
SEND_QUEUE = 65536
