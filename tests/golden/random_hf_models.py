"""Random models of transformers as goldens: configs, weights, inputs and logits. Part of make_hf_*_logits.py."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers


def save_goldens(
    file: str,
    models: Mapping[str, transformers.PreTrainedModel],
    weights_of: Callable[[transformers.PreTrainedModel], dict[str, torch.Tensor]],
) -> None:
    """Write a file beside this one; models that read two texts have "t5" in their name.

    The texts have 40 tokens, and 21 in the decoder, more than the windows; the second one is padded.

    Args:
        file: its name.
        models: by name.
        weights_of: the tensors of a model by their names in files, without copies.
    """
    out = {"versions": np.array([torch.__version__, transformers.__version__])}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as directory:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(directory)
            out[f"{name}.config"] = np.array((Path(directory) / "config.json").read_text())
        torch.manual_seed(0)
        for parameter in model.parameters():  # larger than at initialization, so that every part shows in the logits
            torch.nn.init.normal_(parameter, 0.0, 0.3)
            parameter.data = parameter.data.half().float()
        inputs = {
            "input_ids": torch.randint(1, 61, (2, 40)),
            "attention_mask": (torch.arange(40)[None] < torch.tensor([[40], [29]])).long(),
        }
        if "t5" in name:
            decoder_ids = torch.randint(1, 61, (2, 21))
            inputs |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": torch.ones_like(decoder_ids)}
        with torch.no_grad():
            out[f"{name}.logits"] = model.eval()(**inputs).logits.float().numpy()
        out |= {f"{name}.inputs.{key}": value.numpy() for key, value in inputs.items()}
        weights = weights_of(model)
        out |= {f"{name}.weights.{key}": value.numpy().astype(np.float16) for key, value in weights.items()}
    np.savez_compressed(Path(__file__).parent / file, **out)
