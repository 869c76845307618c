"""KV pages: of one model (``pages``) or of several in a pool, and their way to RAM and back."""
