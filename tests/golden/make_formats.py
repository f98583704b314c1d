"""Writes `format_2/` and `format_3/`: runs of t5like from before config format 4, with the losses of their next steps.

It needs the code of that time, not today's. From the repository's root, for format 2 and then format 3:

    git worktree add /tmp/format_2 52f64f7 && cd /tmp/format_2 && python REPOSITORY/tests/golden/make_formats.py 2
    git worktree add /tmp/format_3 e52c3ba && cd /tmp/format_3 && python REPOSITORY/tests/golden/make_formats.py 3

`run` is the run after two of four steps, without the files that no other command reads. `text.txt` is its training
text. `expected.npz` has the losses of steps 3 and 4 (``losses``), names and digests of the parameters after step 2
(``params``, ``sha256``), ids, and the logits of a model that reads them. Old formats do not change: nobody has to run
this again.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

CONFIG = """
from t5like.config import default

def get_config():
    config = default()
    config.tokenizer.update(vocab_size=380, num_sentinels=10)
    config.data.update(source="text:text.txt", text_documents="line", heldout_fraction=0.1, directory="prepared")
    config.data.update(batch_size=4, inputs_length=24, targets_length=10, document_borders="segments", num_workers=1)
    config.data.update(objective=("OBJECTIVE", "prefix_lm"), objective_rates=(1, 0, 1, 3), change_steps=(3,))
    config.model.update(num_layers=1, model_dim=8, num_heads=2, head_dim=4, mlp_dim=8, vocab_multiple=4)
    config.model.update(tied_embeddings=True, dtype="float32", layers="unroll", MODEL)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="constant", warmup_steps=0)
    config.train.update(num_steps=2, eval_batches=1, log_every=1, max_bad_steps=5, wait_seconds=700)
    return config
"""
DIFFERENCES = {
    2: {"OBJECTIVE": "span_corruption", "MODEL": 'architecture="decoder", attention_window=8'},
    3: {
        "OBJECTIVE": "causal_lm",
        "MODEL": 'architecture="decoder", positions="rotary", rotary_scaling="yarn", rotary_base=500.0, '
        "rotary_factor=2.0, rotary_original_length=32, rotary_slow=0.5, rotary_fast=16.0, rotary_attention=1.1",
    },
}


def main(number: int) -> None:
    """Train for two steps, keep the run, and record what the next two steps give."""
    sys.path.insert(0, str(Path.cwd()))
    target = Path(__file__).parent / f"format_{number}"
    rng = random.Random(number)
    words = ["".join(rng.choices("abdegiklmnoprstu", k=rng.randint(2, 7))) for _ in range(60)]
    config = CONFIG
    for name, value in DIFFERENCES[number].items():
        config = config.replace(name, value)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "text.txt").write_text("".join(" ".join(rng.choices(words, k=12)) + "\n" for _ in range(100)))
        (folder / "config.py").write_text(config)
        train = [sys.executable, "-m", "t5like", "train", "--config=config.py", "--workdir=run"]
        variables = {"PYTHONPATH": str(Path.cwd()), "PATH": os.environ["PATH"]}
        subprocess.run(train, cwd=folder, check=True, env=variables)
        shutil.rmtree(target, ignore_errors=True)
        (target / "run").mkdir(parents=True)
        shutil.copyfile(folder / "text.txt", target / "text.txt")
        for name in ("config.json", "tokenizer.model"):
            shutil.copyfile(folder / "run" / name, target / "run" / name)
        shutil.copytree(folder / "run" / "checkpoints", target / "run" / "checkpoints")
        subprocess.run([*train, "--config.train.num_steps=4"], cwd=folder, check=True, env=variables)
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if record["step"] in (3, 4) and "train/loss" in record]
    np.savez_compressed(target / "expected.npz", losses=losses, **outputs(target / "run"))


def outputs(workdir: Path) -> dict[str, np.ndarray]:
    """Digests of the parameters of a run, and logits."""
    from t5like import run
    from t5like.model.transformer import Transformer
    from t5like.types import Batch

    loaded = run.load(workdir)
    ids = np.random.default_rng(0).integers(3, 370, (1, 5)).astype(np.int32)
    encodes = loaded.config.model.architecture != "decoder"
    batch = Batch(ids[:, ::-1], ids, np.ones(ids.shape, np.float32), ids if encodes else None)
    logits = jax.jit(Transformer(loaded.config).apply)({"params": loaded.params}, batch)
    named = jax.tree_util.tree_flatten_with_path(loaded.params)[0]
    names = ["/".join(key.key for key in path) for path, _ in named]
    digests = [hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for _, value in named]
    return {"ids": ids, "logits": np.asarray(logits), "params": names, "sha256": digests}


if __name__ == "__main__":
    main(int(sys.argv[1]))
