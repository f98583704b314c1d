"""LoRA of Llama 2 7B on one chip of 16 GB: an int8 base, adapters of rank 16 on all kernels of the layers.

    t5like import --format=hf --input=LLAMA --workdir=BASE
    t5like train --config=configs/lora_llama_7b.py --workdir=RUN --config.init_from.checkpoint=BASE

Rows of 2,048 tokens, 8 per step, one at a time. Recipe: rank and targets as QLoRA (Dettmers et al. 2023,
arXiv:2305.14314, section 5.1: adapters on all linear layers matter most), constant learning rate of 2e-4. Hardware: one
TPU v5e by `t5like plan --topology=v5e:1x1`, or one GPU of 24 GB. Time and expected loss: not measured.
"""

import ml_collections

from t5like.config import schema


def get_config() -> ml_collections.ConfigDict:
    config = schema.default()
    config.tokenizer.update(vocab_size=32_000, num_sentinels=0, model_type="bpe")
    config.data.update(objective="causal_lm", inputs_length=0, targets_length=2048, batch_size=8)
    config.data.source = ("text:my_texts/**/*.txt",)
    config.model.update(
        architecture="decoder",
        num_layers=32,
        model_dim=4096,
        num_heads=32,
        head_dim=128,
        mlp_dim=11_008,
        mlp="gated_silu",
        positions="rotary",
        norm="rms",
        norm_epsilon=1e-5,
        scale_attention=True,
        init="gpt2",
        remat="full",
    )
    config.lora.update(rank=16, alpha=16.0, base_dtype="int8")
    config.optimizer.update(name="adamw", learning_rate=2e-4, schedule="constant", warmup_steps=100, b2=0.95)
    config.train.update(num_steps=1_000, microbatches=8, loss_chunk=512, checkpoint_every=100, eval_every=100)
    return config
