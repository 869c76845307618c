"""Records what transformers generates from SmolLM2 with the system test's adapter merged into its weights.

    PYTHONPATH=. .venv-reference/bin/python tests/system/make_adapter_reference.py MODEL.gguf

``benchmarks/reference.py`` makes that environment. The least gap between the two largest logits is recorded
with the text: where it is small, rounding could decide.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.drivers.jax.lora_files import ALPHA, PROMPT, RANK, merged, smollm2_adapter

TOKENS = 24
TARGET = Path(__file__).parents[1] / "data" / "reference" / "smollm2-135m-adapter.json"


def main(file: Path) -> None:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.gguf").symlink_to(file.absolute())
        options = {"gguf_file": "model.gguf"}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    changed = merged(weights, smollm2_adapter(), ALPHA / RANK)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in changed.items()})
    asked = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(
        **asked, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best = torch.stack(made.logits)[:, 0].topk(2).values
    text = tokenizer.decode(made.sequences[0, asked["input_ids"].shape[1] :])
    gap = float((best[:, 0] - best[:, 1]).min())
    TARGET.write_text(
        json.dumps({"prompt": PROMPT, "text": text, "least_gap": round(gap, 5)}, indent=1) + "\n"
    )
    print(TARGET.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
