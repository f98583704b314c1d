"""Writes `format_1/`: a run as t5like wrote it while configs had format 1, and what its model said then.

It needs the code of then, not today's. From the repository's root:

    git worktree add /tmp/format_1 e76e9e6
    cd /tmp/format_1 && python /path/to/tests/golden/make_format_1.py /path/to/tests/golden/format_1

`format_1/run` is that run without what no other command reads; `format_1/said.npz` has ids that encoder and decoder
read, the logits, and the answer to a prompt. Nobody should have to run this again: old formats do not change.
"""

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
    config.data.update(batch_size=4, inputs_length=24, targets_length=10)
    config.model.update(num_layers=1, model_dim=8, num_heads=2, head_dim=4, mlp_dim=8, vocab_multiple=4)
    config.model.update(tied_embeddings=True)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="constant", warmup_steps=0)
    config.train.update(num_steps=2, eval_batches=1)
    return config
"""


def main(place: Path) -> None:
    """Train for two steps in a folder of its own, and keep what is needed."""
    sys.path.insert(0, str(Path.cwd()))
    from t5like.generate import Generator

    from t5like import run
    from t5like.model.transformer import Transformer
    from t5like.types import Batch

    rng = random.Random(0)
    words = ["".join(rng.choices("abdegiklmnoprstu", k=rng.randint(2, 7))) for _ in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "text.txt").write_text("".join(" ".join(rng.choices(words, k=12)) + "\n" for _ in range(200)))
        (folder / "config.py").write_text(CONFIG)
        train = [sys.executable, "-m", "t5like", "train", "--config=config.py", "--workdir=run"]
        subprocess.run(train, cwd=folder, check=True, env={"PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin:/bin"})
        shutil.rmtree(place, ignore_errors=True)
        for name in ("config.json", "tokenizer.model", "checkpoints"):
            source, target = folder / "run" / name, place / "run" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    loaded = run.load(place / "run")
    ids = np.random.default_rng(0).integers(3, 370, (2, 12)).astype(np.int32)
    batch = Batch(ids[:, ::-1], ids, np.ones(ids.shape, np.float32), ids)
    logits = jax.jit(Transformer(loaded.config).apply)({"params": loaded.params}, batch)
    prompt = f"{words[0]} <extra_id_0> {words[1]}"
    [answer] = Generator(loaded.config, loaded.params, loaded.tokenizer)([prompt], max_new_tokens=8)
    np.savez(place / "said.npz", ids=ids, logits=np.asarray(logits), prompt=prompt, answer=answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
