"""How many positions of a row the head reads. Called by `optim.step`, `metrics.flops` and `plan`."""

from t5like.config.schema import Config
from t5like.data.objectives.denoisers import denoisers

FEW_TARGETS = 0.75  # of a row; if there are more, selecting them would save little


def head_length(config: Config) -> int:
    """The most targets that a row has, if they are few, or the length of the targets with padding.

    An encoder that predicts masked tokens has few, and so has a decoder that reads inputs before its targets. The
    targets of an encoder-decoder are only those, with little padding.
    """
    if config.model.architecture == "encoder_decoder":
        return config.data.targets_length
    length = config.data.inputs_length if config.model.architecture == "encoder" else config.row_length
    targets = [each.spans.targets if each.spans else each.masked or length for each in denoisers(config)]
    most = max(targets, default=length)
    return most if most <= FEW_TARGETS * length else length
