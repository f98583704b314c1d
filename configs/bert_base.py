"""BERT base: an encoder for masked language modelling and next-sentence prediction.

110 million parameters: 109,482,240 with 30,522 rows, and 624,188 in the two heads.

    t5like train --config=configs/bert_base.py --workdir=RUN --config.data.source='text:my_texts/*.txt'

Recipe: Devlin et al. 2019, section A.2, with three differences: all rows have 512 tokens (BERT trains on 128 tokens in
the first 90 % of the steps), the tokenizer is SentencePiece instead of WordPiece, and dropout is applied at the same
points as in the other models of t5like.
Hardware: one accelerator with 40 GB, or several. Time and expected loss: not measured.
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.update(vocab_size=30_522)
    config.data.update(objective="mlm_nsp", inputs_length=512, batch_size=256)
    config.data.source = ("tfds:c4/en:3.1.0",)
    config.data.heldout_fraction = 0.001
    config.model.update(
        architecture="encoder",
        num_layers=12,
        model_dim=768,
        num_heads=12,
        head_dim=64,
        mlp_dim=3072,
        mlp="gelu_exact",
        positions="learned",
        max_length=512,
        norm="layer",
        norm_position="post",
        norm_epsilon=1e-12,
        embedding_norm=True,
        token_types=2,
        head="mlm",
        biases=True,
        tied_embeddings=True,
        scale_attention=True,
        init="bert",
        dropout_rate=0.1,
    )
    config.optimizer.update(
        name="adamw",
        learning_rate=1e-4,
        schedule="linear",
        warmup_steps=10_000,
        epsilon=1e-6,
        weight_decay=0.01,
    )
    config.train.update(num_steps=1_000_000, z_loss=0.0, log_every=100, eval_every=10_000, checkpoint_every=10_000)
    config.mesh.update(data=1, fsdp=-1)
    return config
