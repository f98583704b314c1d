"""LoRA of Llama 2 7B on one chip of 16 GB: an int8 base, adapters of rank 16 on all kernels of the layers.

    t5like import --format=hf --input=LLAMA --workdir=BASE
    t5like train --config=configs/lora_llama_7b.py --workdir=RUN --config.init_from.checkpoint=BASE

Rows of 2,048 tokens, 8 per step, one at a time. Recipe: rank and targets as QLoRA (Dettmers et al. 2023,
arXiv:2305.14314, section 5.1: adapters on all linear layers matter most), constant learning rate of 2e-4. Hardware: one
TPU v5e by `t5like plan --topology=v5e:1x1`, or one GPU of 24 GB. Time and expected loss: not measured.
"""

import llama_7b
import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = llama_7b.get_config()
    config.data.update(source=("text:my_texts/**/*.txt",), targets_length=2048, batch_size=8, heldout_fraction=0.01)
    config.lora.update(rank=16, alpha=16.0, base_dtype="int8")
    config.optimizer.update(schedule="constant", learning_rate=2e-4, final_fraction=0.0, warmup_steps=100)
    config.optimizer.update(epsilon=1e-8, weight_decay=0.0)
    config.train.update(num_steps=1_000, microbatches=8, loss_chunk=512, checkpoint_every=100, eval_every=100)
    config.mesh.update(data=-1, fsdp=1)
    return config
