"""From an encoder's numbers to what callers ask for: similarities, relevance, probabilities. Pure."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from operator import mul


def unpack(rows: bytes, width: int) -> list[tuple[float, ...]]:
    """Little-endian float32 [n, width] as n rows of numbers."""
    return list(struct.iter_unpack(f"<{width}f", rows))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the angle between two vectors; 0.0 where one of them is zero."""
    lengths = math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / lengths if lengths else 0.0


def sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


def probabilities(logits: Sequence[float], exclusive: bool) -> list[float]:
    """Softmax where one label is true, else each by itself."""
    if not exclusive or len(logits) == 1:
        return [sigmoid(logit) for logit in logits]
    peak = max(logits)
    weights = [math.exp(logit - peak) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def ranked(scores: Sequence[float], top: int = 0) -> list[tuple[int, float]]:
    """(index, score), best first, equals in their order; ``top`` 0 keeps all."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [(index, scores[index]) for index in order[: top or len(order)]]
