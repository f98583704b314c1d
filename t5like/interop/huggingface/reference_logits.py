"""Logits of a Hugging Face directory, computed by AutoModelForTASK.

    python -m t5like.interop.huggingface.reference_logits TASK DIR INPUTS.npz OUTPUT.npz

`logits_check` runs it as a separate process, so that no process has both models. It imports torch but not JAX.
"""

import sys

import numpy as np
import torch
import transformers


def main(task: str, directory: str, inputs: str, output: str) -> None:
    """Run transformers' model of a directory on saved inputs, in float32, and save its logits."""
    model = getattr(transformers, f"AutoModelFor{task}").from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(**{key: torch.from_numpy(value) for key, value in np.load(inputs).items()})
    logits = {"logits": out.prediction_logits if "prediction_logits" in out else out.logits}
    if "seq_relationship_logits" in out:
        logits["pair_logits"] = out.seq_relationship_logits
    np.savez(output, version=transformers.__version__, **{key: value.numpy() for key, value in logits.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
