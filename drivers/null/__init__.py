"""A full driver without a model: deterministic tokens, a configurable step time. Most tests run on it."""
