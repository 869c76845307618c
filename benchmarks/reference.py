"""Records what Hugging Face transformers generates in float32 from a GGUF file, as the reference for parity.

    python benchmarks/reference.py MODEL.gguf tests/data/reference/NAME.json

For prompts of several kinds it writes the prompt's token ids, the greedy continuation (end-of-text does not
stop it) and, at each position, the gap between the two largest logits. Where another engine's token differs,
the difference counts only if that gap is over ``tolerance``: below it, float32 rounding decides.

torch and transformers are installed on demand into an environment of their own, ``.venv-reference``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

REQUIREMENTS = ["torch==2.13.0", "transformers>=5,<6", "gguf>=0.17,<0.20", "accelerate>=1,<2"]
TOLERANCE = 1e-3
NEW_TOKENS = 80

STORY = (
    "The harbour of Elsinore wakes before its people do. At four the first lamps are lit on the quay, and "
    "the men who mend nets sit down on upturned crates with their backs to the wind. Number {n} on the "
    "roll was the boat of Captain Ingrid Moe, who had sailed to Riga {n} times and never once lost a barrel. "
)
CODE = '''def merge_sort(items: list[int]) -> list[int]:
    """Sort items by divide and conquer."""
    if len(items) < 2:
        return items
    middle = len(items) // 2
    left = merge_sort(items[:middle])
'''
Message = dict[str, str]


def _chat(*turns: str) -> list[Message]:
    roles = ["system"] + ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns)]


PROMPTS: dict[str, str | list[Message]] = {
    "short": "The capital of France is",
    "chat": _chat("You are a helpful AI assistant.", "What is gravity? Answer in two sentences."),
    "long": "".join(STORY.format(n=n) for n in range(1, 13)),
    "non-latin": (
        "Москва — столица России. 東京は日本の首都です。 القاهرة عاصمة مصر. नई दिल्ली 🇮🇳 भारत की राजधानी"
    ),
    "code": CODE,
    "chat-code": _chat("You write Python.", "Write a function that checks whether a number is prime."),
    "chat-turns": _chat(
        "You are a patient teacher.",
        "Why is the sky blue?",
        "Because air scatters blue light more strongly than red light.",
        "And why are sunsets red?",
    ),
    "chat-long": _chat(
        "You summarise texts in one paragraph.",
        "Summarise this:\n\n" + "".join(STORY.format(n=n) for n in range(20, 34)),
    ),
    "data": (
        '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"]}\n'
        '{"name": "Alan Turing",'
    ),
}


def record(model_file: Path) -> dict[str, Any]:
    """Generate from every prompt; runs inside the reference environment."""
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(model_file.parent), "gguf_file": model_file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    cases = []
    for name, prompt in PROMPTS.items():
        tokens = encode(tokenizer, prompt)
        output, gaps = generate(model, tokens)
        cases.append({"name": name, "prompt": tokens, "output": output, "gaps": gaps})
        print(f"{name}: {len(tokens)} tokens -> {tokenizer.decode(output)!r}", flush=True)
    return {
        "model_sha256": hashlib.sha256(model_file.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tolerance": TOLERANCE,
        "cases": cases,
    }


def encode(tokenizer: Any, prompt: str | list[Message]) -> list[int]:
    """Token ids of a text, or of a conversation in the model's chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generate(model: Any, tokens: list[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation and the gap between the two largest logits at each of its positions."""
    import torch

    output: list[int] = []
    gaps: list[float] = []
    feed, past = torch.tensor([tokens]), None
    with torch.inference_mode():
        while len(output) < NEW_TOKENS:
            result = model(feed, past_key_values=past, use_cache=True)
            past = result.past_key_values
            top = result.logits[0, -1].float().topk(2)
            output.append(int(top.indices[0]))
            gaps.append(round(float(top.values[0] - top.values[1]), 6))
            feed = top.indices[:1][None]
    return output, gaps


def main() -> None:
    """Record into a file, in the reference environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--environment", type=Path, default=Path(".venv-reference"))
    options = parser.parse_args()
    if Path(sys.prefix).resolve() != options.environment.resolve():
        python = options.environment / "bin" / "python"
        if not python.exists():
            venv.create(options.environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        os.execv(python, [str(python), __file__, *sys.argv[1:]])
    text = json.dumps(record(options.model), ensure_ascii=False, separators=(",", ":"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text.replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main()
