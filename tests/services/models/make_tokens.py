"""Makes ``tokens.json``: what the ``transformers`` library tokenizes strings of many kinds to.

    python tests/services/models/make_tokens.py MODEL.gguf > tests/services/models/tokens.json

needs ``transformers>=5,<6``, ``gguf`` and ``torch``. Its reading of a GGUF file does not look at
``tokenizer.ggml.pre``, and so splits digits after white space differently from the tokenizer that the model
was trained with; ``ids`` are therefore made with the pre-tokenizer that SmolLM2 was published with, and
``plain`` with what transformers makes of the file alone.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

STRINGS = [
    "",
    " ",
    "  ",
    "\n",
    "\t\n  \r\n",
    "Hello, world!",
    "hello  world   three    four",
    " leading",
    "trailing ",
    "don't you'll we've I'm she'd they're it's DON'T",
    "1234567890",
    "x 12  34\n56",
    "3.14159, -2e10 and 1,000",
    "½ ² ٣ Ⅷ 一二三",
    "naïve café Ünïcödé",
    "Привет, мир! Как дела?",
    "你好，世界。今天天气很好。",
    "こんにちは世界",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "안녕하세요 세계",
    "👋🌍 👩‍👩‍👧‍👦 🇩🇪 ✨",
    "e\u0301 vs é",
    "\u200b\u00a0\u3000zero width",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|> <|im_start",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "if (a && b || !c) { return a[i]->b; }",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    '{"key": [1, 2.5, null, true]}',
    "https://example.org/a?b=c&d=%20#e",
    "ALL CAPS AND CamelCase and snake_case and kebab-case",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---___===",
    "\x00\x01\x7f",
    "\\n \\t \\u00e9",
    "$\\int_0^1 x^2 dx = \\frac{1}{3}$",
    "\U0001f9ff\U00010348\ufffd",
    "a\u0000b",
]


def random_strings(count: int) -> list[str]:
    rng = random.Random(1)
    alphabets = [
        "abc xyz\n",
        "0123456789 .,\n",
        "äöü ßéñ",
        "你好世界 ，。",
        "👋🌍✨ a",
        " \t\n\r",
        "(){}[]<>|=_",
    ]
    pieces = ["".join(alphabets), *alphabets]
    return ["".join(rng.choices(rng.choice(pieces), k=rng.randint(1, 40))) for _ in range(count)]


def main() -> None:
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    strings = STRINGS + random_strings(300)
    plain = [tokenizer(text)["input_ids"] for text in strings]
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    conversation = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Und auf Deutsch?"},
    ]
    rows = []
    for text, without in zip(strings, plain):
        ids = tokenizer(text)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rows.append({"text": text, "ids": ids, "plain": without, "decoded": decoded})
    chat = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    made = {
        "transformers": transformers.__version__,
        "chat": {"messages": conversation, "text": chat},
        "rows": rows,
    }
    json.dump(made, sys.stdout, ensure_ascii=True, separators=(",", ":"))


if __name__ == "__main__":
    main()
