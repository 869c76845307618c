"""What every driver can rely on in a sequence: checked by the scheduler before a driver hears of it, so that
one bad request cannot fail the quantum that others share."""

from __future__ import annotations

from llmos.drivers.sdk.messages import Sampling
from llmos.ipc.errors import InvalidArgument

STOP_LIMIT = 16
BIAS_LIMIT = 512
TEXT_LIMIT = 4096
TEXT_TOKENS = 1 << 18


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Refuse sampling parameters that are out of range, not finite, or too many."""
    ranges = {
        "temperature": (0.0, 1e4),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1e-3, 1e3),
        "presence_penalty": (-100.0, 100.0),
        "frequency_penalty": (-100.0, 100.0),
        "top_k": (0, 2**31 - 1),
        "seed": (0, 2**32 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(sampling, name)
        if not low <= value <= high:
            raise InvalidArgument(f"{name} is {value}, not in {low}..{high}")
    if len(sampling.logit_bias) > BIAS_LIMIT:
        raise InvalidArgument(f"at most {BIAS_LIMIT} logit biases, not {len(sampling.logit_bias)}")
    for token, value in sampling.logit_bias.items():
        if not 0 <= token < vocab_size or not -1e4 <= value <= 1e4:
            raise InvalidArgument(f"logit bias {value} of token {token} is out of range")
