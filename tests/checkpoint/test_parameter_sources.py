"""Which parameters of a checkpoint become those of a model that predicts labels."""

import numpy as np
from conftest import small

from t5like.checkpoint.parameter_sources import choose_source, ignored, source_names

LABELS = {"objective": "classification", "labels": ("a", "b")}


def shapes(*names):
    return {name: np.zeros(1) for name in names}


def test_a_classifier_starts_with_the_encoder_and_the_pooler_of_bert_and_leaves_its_heads():
    config = small(model={"architecture": "encoder", "head": "mlm", "token_types": 2}, data=LABELS)
    old = small(model={"architecture": "encoder", "head": "mlm", "token_types": 2}, data={"objective": "mlm_nsp"})
    wanted = shapes("embedding", "label_head/pooler/kernel", "label_head/classes/kernel")
    stored = shapes("embedding", "pairs/pooler/kernel", "pairs/classes/kernel", "mlm/dense/kernel", "head_bias")
    names = source_names(config, old, wanted, stored)
    sources = [choose_source(config, name, wanted[name], names[name], stored).source for name in wanted]
    assert sources == ["embedding", "pairs/pooler/kernel", None]
    assert ignored(config, old, stored, sources) == ["pairs/classes/kernel", "mlm/dense/kernel", "head_bias"]


def test_an_encoder_starts_with_that_of_an_encoder_decoder_and_keeps_its_own_head():
    old, config = small(), small(model={"architecture": "encoder"}, data=LABELS)
    stored = shapes(
        "embedding", "encoder/final_norm/scale", "decoder/final_norm/scale", "head", "label_head/classes/bias"
    )
    wanted = shapes("embedding", "encoder/final_norm/scale", "label_head/classes/bias")
    names = source_names(config, old, wanted, stored)
    sources = [choose_source(config, name, wanted[name], names[name], stored).source for name in wanted]
    assert sources == list(wanted)
    assert ignored(config, old, stored, sources) == ["decoder/final_norm/scale", "head"]
    assert ignored(old, old, stored, sources) == []  # an unknown decoder is refused, not ignored
