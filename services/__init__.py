"""The isolated servers, one folder each: ``messages.py`` is the link, ``server.py`` the thin handlers, and
the rest is policy that never touches a socket, a clock or a device.

manifest.py    what a system consists of: its drivers, models and settings
supervisor/    starts, watches, restarts and stops all processes
security/      mints, verifies, attenuates and revokes capabilities
memory/        owns the pages of every KV arena, and the prefix index over them
scheduler/     turns tasks into quanta for the drivers
models/        loads models, applies chat templates, tokenizes and detokenizes
monitor/       collects counters and health
gateway/       the OpenAI-compatible HTTP API
"""
