"""Logits of a Hugging Face directory, computed by AutoModelForKIND.

    python -m t5like.interop.huggingface.reference_logits KIND DIR INPUTS.npz OUTPUT.npz

Run by `hf.logits` as a process of its own, so that none has both models. It imports torch and no JAX.
"""

import sys

import numpy as np
import torch
import transformers


def main(kind: str, directory: str, given: str, made: str) -> None:
    """Run transformers' model of a directory on saved inputs, in float32, and save its logits."""
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(**{key: torch.from_numpy(value) for key, value in np.load(given).items()})
    found = {"logits": out.prediction_logits if "prediction_logits" in out else out.logits}
    if "seq_relationship_logits" in out:
        found["pair_logits"] = out.seq_relationship_logits
    np.savez(made, version=transformers.__version__, **{key: value.numpy() for key, value in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
