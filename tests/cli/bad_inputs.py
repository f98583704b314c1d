"""Wrong inputs of every kind, for `test_refused_inputs`; tests/golden/refusals.txt has the line that refuses each.

Functions change files below a folder that was good: a folder for data, one with a tokenizer, a run, a model directory.
"""

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LINES = [f"a line of text with the number {number}" for number in range(60)]
JSONL = "".join(json.dumps({"text": line}) + "\n" for line in LINES).encode()

# ---- Command lines; code 2 ----

COMMAND_LINES = (
    "",
    "tarin",
    "train",
    "train --hlep",
    "train --workdir=/proc/nowhere --config.seed=3",
    "train --config=tinny --workdir=/proc/nowhere",
    "train --config=configs/t5_smal.py --workdir=/proc/nowhere",
    "train --config=configs/tiny.py --workdir=/proc/nowhere --stesp=3",
    "train --config=configs/tiny.py --workdir=/proc/nowhere --num_steps=5",
    "train --config=configs/tiny.py --workdir=/proc/nowhere --config.seed",
    "train --config=configs/tiny.py --workdir=/proc/nowhere --fake_devices=x",
    "train --config=configs/tiny.py --workdir=/proc/nowhere --fake_devices=0",
    "train --config=configs/tiny.py --workdir=/proc/nowhere --fake_devices=-1",
    "train --config=tiny --workdir=/proc/nowhere --fake_devices=9999999",
    "export --format=stablehlo --workdir=/proc/nowhere --output=/proc/out --family=t5",
    "export --format=hf --workdir=/proc/nowhere --output=/proc/out --temperature=0",
    "import --format=hf --input=/proc/in --workdir=/proc/nowhere --config=configs/tiny.py",
    "evaluate --workdir=/proc/nowhere --config.seed=1",
    "evaluate --workdir=/proc/nowhere --step=x",
    "evaluate --workdir=/proc/nowhere --limit=3",
    "evaluate --workdir=/proc/nowhere --tasks=a,,b",
    "evaluate --workdir=/proc/nowhere --tasks=a --limit=0",
    "evaluate --workdir=/proc/nowhere --tasks=a --tasks_dir=/proc/nowhere",
    "generate --workdir=/proc/nowhere --prompt=a --output=b.jsonl",
    "generate --workdir=/proc/nowhere --prompt=a --num_beams=4 --temperature=1",
    "generate --workdir=/proc/nowhere --prompt=a --num_returned=2",
    "generate --workdir=/proc/nowhere --prompt=a --top_p=0.9",
    "generate --workdir=/proc/nowhere --prompt=a --max_new_tokens=0",
    "generate --workdir=/proc/nowhere --prompt=a --temperature=-1",
    "generate --workdir=/proc/nowhere --prompt=a --temperature=nan",
    "generate --workdir=/proc/nowhere --prompt=a --seed=-1",
    "generate --workdir=/proc/nowhere --prompt=a --max_new_tokens=1000000000",
    "generate --workdir=/proc/nowhere --prompt=a --temperature=1e-30",
    "export --format=stablehlo --workdir=/proc/a --output=/proc/b --prompt_length=1000000000",
    "plan --config=tiny --topology=cpu:8 --tokens=nan",
    "plan --config=tiny --topology=cpu:8 --price=-1",
    "evaluate --workdir=/proc/nowhere --step=-1",
    "inspect data",
    "inspect data --config=tiny --workdir=/proc/nowhere",
    "inspect data --config=tiny --step=0",
    "inspect data --config=tiny --rows=0",
    "inspect model --config=tiny --num_slices=2",
    "inspect model --config=tiny --topology=z9:3",
    "inspect model --config=tiny --topology=v5e:8x8 --config.mesh.data=3",
    "train --overfit=1",
    "train --config=tiny --overfit=0",
    "train --config=tiny --workdir=/proc/nowhere --a.config.seed=1",
    "compare-steps tinny",
    "compare-steps tiny --step=0",
    "compare-steps tiny --output=/proc/nowhere/a.txt",
    "compare-steps tiny --output=/proc/nowhere/a.npz --b.config.seed=1",
    "compare-steps rl/code",
)

# ---- Fields of the config, beside the flags of the smallest run; code 2 ----

FIELDS = (
    "train.num_step=3", "trian.num_steps=3", "train=3", "train.num_steps.x=3", "train.num_steps=many",
    "train.num_steps=0", "train.num_steps=99999999999999999999", "train.checkpoint_every=0", "train.microbatches=3",
    "train.process_timeout_seconds=0", "train.compiler_options=xla_nothing=1", "train.z_loss=nan",
    "train.keep_checkpoints=0", "train.log_every=1.5",
    "seed=-1", "seed=99999999999999999999", "model.mlp=rely", "model.architecture=t5", "model.dtype=fp17",
    "model.remat=some", "model.num_heads=0", "model.biases=maybe", "model.dropout_rate=1", "model.num_kv_heads=3",
    "model.kernels=cuda", "model.attention_window=-1", "optimizer.name=sgdd", "optimizer.learning_rate=-1",
    "optimizer.learning_rate=nan", "optimizer.learning_rate=inf", "optimizer.schedule=step", "optimizer.b1=2",
    "optimizer.frozen=(", "optimizer.adam_factor=0",
    "data.batch_size=0", "data.batch_size=12", "data.batch_size=8.5", "data.objective=mlm",
    "data.objective=spans", "data.objective_rates=-1", "data.objective_rates=0", "data.objective_rates=1,2",
    "data.targets_length=5", "data.noise_density=1", "data.heldout_fraction=0", "data.source=txt:a", "data.source=",
    "data.text_documents=word", "data.directory=/a", "tokenizer.num_sentinels=1", "tokenizer.vocab_size=0",
    "mesh.fsdp=3", "mesh.data=0", "mesh.fsdp=-1", "mesh.tensor=4", "mesh.pipeline=2", "evaluate.metrics=accurate",
    "init_from.step=3", "init_from.adapt=width", "init_from.warmup_steps=3", "init_from.decoder_step=3",
    "distill.weight=2", "distill.weight=0.9", "lora.alpha=8", "lora.rank=8",
)  # fmt: skip
FIELDS_TOGETHER = (
    "model.mlp_dim=16000000 model.model_dim=1048576",
    "data.batch_size=16777216 data.inputs_length=4096 data.targets_length=4096 tokenizer.num_sentinels=999 "
    "tokenizer.vocab_size=2000",
    "model.layer_pattern=local,global,global model.attention_window=4",
    "model.attention_window=40 mesh.context=2",
    "lora.rank=8 optimizer.frozen=encoder/.*",
    "lora.rank=4096 init_from.checkpoint=/proc/nowhere",
    "init_from.warmup_steps=1000000 init_from.checkpoint=/proc/nowhere",
    "distill.top_k=100000 distill.teacher=/proc/nowhere",
)

# ---- `t5like rl` and others: the command, and fields beside the flags of `conftest.rl_flags`; code 2, 3 or 4 ----

RL = (
    "train",
    "rl rl.method=none",
    "rl rl.rewards=exactmatch",
    "rl rl.rewards=exact_match:answer",
    "rl rl.rewards=no_module:function",
    "rl rl.rewards=",
    "rl rl.reward_weights=1,2",
    "rl rl.answers_per_prompt=1",
    "rl rl.answers_per_prompt=65536",
    "rl rl.top_k=5",
    "rl rl.updates_per_rollout=3",
    "rl rl.kl_coefficient=0.1",
    "rl rl.max_kl=1",
    "rl rl.overlong_tokens=99",
    "rl rl.advantage=gae rl.ratio=sequence",
    "rl rl.method=dpo",
    "rl rl.method=dpo rl.rewards= rl.rejected_field=worse",
    "rl rl.method=dpo rl.rewards= rl.rejected_field=chosen",
    "rl init_from.checkpoint=",
    "rl init_from.checkpoint=/proc/nowhere",
    "prepare init_from.checkpoint=/proc/nowhere",
    "rl distill.teacher=/proc/nowhere",
    "rl model.architecture=encoder",
    "rl data.objective=causal_lm",
    "rl data.rates=1",
    "rl data.inputs_length=3",
    "rl data.inputs_template={question}",
    "rl data.messages_field=inputs",
)

# ---- Config files: content of bad.py or bad.json; code 2 ----

CONFIG_FILES: dict[str, tuple[str, bytes]] = {
    "syntax": ("bad.py", b"def get_config(:\n"),
    "nothing in it": ("bad.py", b""),
    "no config returned": ("bad.py", b"def get_config():\n    return 3\n"),
    "an exception": ("bad.py", b"def get_config():\n    return 1 / 0\n"),
    "sys.exit": ("bad.py", b"import sys\nsys.exit(0)\n"),
    "not UTF-8": ("bad.py", b"def get_config():\n    return {'seed': '\xff\xfe'}\n"),
    "NUL bytes": ("bad.py", bytes(100)),
    "an unknown field": ("bad.py", b"def get_config():\n    return {'train': {'num_step': 3}}\n"),
    "a section that is none": ("bad.py", b"def get_config():\n    return {'train': 3}\n"),
    "a wrong type": ("bad.py", b"def get_config():\n    return {'train': {'num_steps': 'ten'}}\n"),
    "an include cycle": ("bad.py", b"import bad\ndef get_config():\n    return bad.get_config()\n"),
    "JSON cut off": ("bad.json", b'{"train": {"num_steps": 3'),
    "a key twice": ("bad.json", b'{"seed": 1, "seed": 2}'),
    "a list": ("bad.json", b"[1]"),
    "a thousand levels": ("bad.json", b"[" * 1000 + b"]" * 1000),
    "a newer format": ("bad.json", b'{"format": 99}'),
    "another extension": ("bad.yaml", b"!!python/object/apply:os.system ['true']\n"),
}

# ---- Data: the files, and the fields; code 3 ----


def write(content: bytes, name: str = "a.jsonl") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def bomb(byte: bytes, end: bytes, start: bytes = b"") -> Callable[[Path], None]:
    """A small file of 80 MB, which are made where they are needed."""
    return lambda folder: write(gzip.compress(start + byte * 80_000_000 + end, 1))(folder)


def parquet(table: dict, cut: int = 0) -> Callable[[Path], None]:
    def arrange(folder: Path) -> None:
        pq.write_table(pa.table(table), path := folder / "a.parquet")
        path.write_bytes(path.read_bytes()[: -cut or None])

    return arrange


DATA: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "no file": (lambda folder: None, {"source": "text:{}/*.text"}),
    "a folder": (lambda folder: (folder / "a.jsonl").mkdir(), {}),
    "a pipe": (lambda folder: os.mkfifo(folder / "a.jsonl"), {}),
    "a broken link": (lambda folder: (folder / "a.jsonl").symlink_to("nowhere"), {}),
    "an empty file": (write(b""), {}),
    "only blank lines": (write(b"\n \n\n"), {}),
    "a bad line of JSON": (write(JSONL + b'{"text": "half\n' + JSONL), {}),
    "a line that is no object": (write(JSONL + b"[1, 2]\n"), {}),
    "no such field": (write(JSONL.replace(b'"text"', b'"body"')), {}),
    "a number for a text": (write(JSONL + b'{"text": 5}\n'), {}),
    "null for a text": (write(JSONL + b'{"text": null}\n'), {}),
    "half of a surrogate pair": (write(JSONL + b'{"text": "\\ud800"}\n'), {}),
    "a thousand levels": (write(JSONL + b'{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}\n"), {}),
    "not UTF-8": (write(JSONL + b'{"text": "caf\xe9"}\n'), {}),
    "UTF-16": (write(JSONL.decode().encode("utf-16")), {}),
    "NUL bytes": (write(bytes(100_000)), {}),
    "lines that end with CR": (write(JSONL.replace(b"\n", b"\r")), {}),
    "gzip cut off": (write(gzip.compress(JSONL)[:-12]), {}),
    "gzip damaged": (write(gzip.compress(JSONL, mtime=0)[:40] + b"\0\0\0\0" + gzip.compress(JSONL)[44:]), {}),
    "gzip in gzip": (write(gzip.compress(gzip.compress(JSONL))), {}),
    "gzip of blank lines, a bomb": (bomb(b"\n", JSONL), {}),
    "gzip of one line, a bomb": (bomb(b"a", b'"}\n', b'{"text": "'), {}),
    "xz": (write(b"\xfd7zXZ\0" + bytes(40)), {}),
    "a PDF": (write(b"%PDF-1.7\n%\xe2\xe3\n", "a.txt"), {"source": "text:{}/a.txt"}),
    "a Parquet file as JSON lines": (write(b"PAR1" + bytes(60) + b"PAR1"), {}),
    "Parquet cut off": (parquet({"text": LINES}, cut=20), {"source": "parquet:{}/a.parquet"}),
    "Parquet with another column": (parquet({"body": LINES}), {"source": "parquet:{}/a.parquet"}),
    "Parquet of numbers": (parquet({"text": [1, 2, 3]}), {"source": "parquet:{}/a.parquet"}),
    "CSV with an open quote": (write(b'text\n"a\nb\n' * 3, "a.csv"), {"source": "csv:{}/a.csv"}),
    "CSV with a field too many": (write(b"text,n\na,1,2\n" * 3, "a.csv"), {"source": "csv:{}/a.csv"}),
    "TSV without its column": (write(b"body\tn\na\t1\n" * 3, "a.tsv"), {"source": "tsv:{}/a.tsv"}),
    "one document": (write(b"the same\n" * 3, "a.txt"), {"source": "text:{}/a.txt", "text_documents": "line"}),
    "less text than a row": (
        write("\n".join(LINES).encode() * 20, "a.txt"),
        {"source": "text:{}/a.txt", "inputs_length": "20000", "targets_length": "5000", "mean_span_length": "3000"},
    ),
    "a template without its field": (
        write(JSONL),
        {"objective": "supervised", "inputs_template": "{question}", "targets_template": "{text}"},
    ),
    "messages that are none": (write(JSONL), {"objective": "supervised", "messages_field": "text"}),
}

# ---- Tokenizers: content of the file; code 3 ----

TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: None,
    "empty": write(b"", "t.model"),
    "no model": write(b"no model at all", "t.model"),
    "a page of a web site": write(b"<!DOCTYPE html><html><title>Sign in</title></html>", "t.model"),
    "cut off": lambda folder: (folder / "t.model").write_bytes((folder / "good.model").read_bytes()[:3000]),
    "another size": lambda folder: shutil.copy(folder / "good.model", folder / "t.model"),
    "a folder": lambda folder: (folder / "t.model").mkdir(),
    "a damaged tokenizer.json": lambda folder: write(b'{"model": {', "t.json")(folder),
    "a tokenizer.json of nothing": lambda folder: write(b"{}", "t.json")(folder),
}

# ---- Checkpoints: the run is damaged at its newest step 2; code 4 ----


def newest(run: Path) -> Path:
    return run / "checkpoints/2"


def edit_metadata(**changes) -> Callable[[Path], None]:
    def arrange(run: Path) -> None:
        path = newest(run) / "meta/metadata"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")

    return arrange


def flip_data(run: Path) -> None:
    for path in (newest(run) / "state").rglob("d/*"):  # some bytes are read by nobody
        raw = bytearray(path.read_bytes())
        raw[2000::4096] = bytes(byte ^ 1 for byte in raw[2000::4096])
        path.write_bytes(raw)


def cut_data(run: Path) -> None:
    for path in (newest(run) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "no run": lambda run: shutil.rmtree(run),
    "no checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "config.json cut off": lambda run: (run / "config.json").write_text("{"),
    "config.json of a newer format": lambda run: (run / "config.json").write_text('{"format": 99}'),
    "metadata cut off": lambda run: (newest(run) / "meta/metadata").write_text('{"format": 1, "sha256"'),
    "metadata of something else": lambda run: (newest(run) / "meta/metadata").write_text("[]"),
    "metadata of a newer format": edit_metadata(format=99),
    "metadata with another checksum": edit_metadata(sha256="0" * 64),
    "metadata of another step": lambda run: (newest(run)).rename(run / "checkpoints/7"),
    "no metadata": lambda run: shutil.rmtree(newest(run) / "meta"),
    "no arrays": lambda run: shutil.rmtree(newest(run) / "state"),
    "a flipped bit": flip_data,
    "arrays cut off": cut_data,
    "no manifest of the arrays": lambda run: (newest(run) / "state/manifest.ocdbt").unlink(),
    "another run's id": lambda run: (run / "checkpoints/run_id").write_text("0" * 32 + "\n"),
    "a damaged run id": lambda run: (run / "checkpoints/run_id").write_text("mine\n"),
    "a stray folder with a commit file": lambda run: (
        (run / "checkpoints/99").mkdir(),
        (run / "checkpoints/99/commit_success.txt").touch(),
    ),
}
DAMAGED = (
    "metadata cut off",
    "metadata of something else",
    "metadata with another checksum",
    "no metadata",
    "no arrays",
    "a flipped bit",
    "arrays cut off",
    "no manifest of the arrays",
    "a stray folder with a commit file",
)

# ---- Models of Hugging Face; code 4 or 3 ----


def safetensors(header: dict | bytes, data: bytes = b"") -> Callable[[Path], object]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def index(**file_of: str) -> Callable[[Path], None]:
    def arrange(model: Path) -> None:
        (model / "model.safetensors").rename(model / "one.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}), encoding="utf-8")

    return arrange


def edit_config(**changes) -> Callable[[Path], None]:
    def arrange(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")

    return arrange


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")


def not_finite(model: Path) -> None:
    path = model / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\x7f"  # NaN in float32, and in the halves of a bfloat16
    path.write_bytes(raw)


def one(dtype: str = "F32", shape: tuple = (2,), offsets: tuple = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


MODELS: dict[str, Callable[[Path], object]] = {
    "no folder": lambda model: shutil.rmtree(model),
    "no config.json": lambda model: (model / "config.json").unlink(),
    "config.json cut off": lambda model: (model / "config.json").write_text("{"),
    "config.json is a list": lambda model: (model / "config.json").write_text("[]"),
    "an unknown architecture": edit_config(model_type="mamba", architectures=["MambaForCausalLM"]),
    "another d_ff": edit_config(d_ff=48),
    "another number of layers": edit_config(num_layers=2, num_decoder_layers=2),
    "a negative size": edit_config(d_model=-32),
    "a text for a size": edit_config(d_model="large"),
    "a pickle": only_pickle,
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "weights cut off": lambda model: (model / "model.safetensors").write_bytes(
        (model / "model.safetensors").read_bytes()[:-100]
    ),
    "weights that are a page": lambda model: (model / "model.safetensors").write_bytes(b"<html>sign in</html>" * 10),
    "a header of 2**60 bytes": lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60)),
    "a header that is no object": safetensors(b"[1]"),
    "a negative shape": safetensors({"a": one(shape=(-1, -2))}, bytes(8)),
    "a negative offset": safetensors({"a": one(offsets=(-8, 0))}, bytes(8)),
    "a shape of 2**60 values": safetensors({"a": one(shape=(2**40, 2**20))}, bytes(8)),
    "a shape that does not fit its bytes": safetensors({"a": one(shape=(3,))}, bytes(8)),
    "tensors that overlap": safetensors({"a": one(), "b": one(offsets=(4, 12))}, bytes(12)),
    "offsets beyond the file": safetensors({"a": one(offsets=(0, 16), shape=(4,))}, bytes(8)),
    "bytes of no tensor": safetensors({"a": one()}, bytes(12)),
    "an unknown dtype": safetensors({"a": one(dtype="X9")}, bytes(8)),
    "a tensor twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "an index that leaves the folder": index(a="../../etc/passwd"),
    "an index with a missing file": index(a="two.safetensors"),
    "an index of nothing": index(),
    "values that are not finite": not_finite,
    "no tokenizer": lambda model: (
        [path.unlink() for path in model.glob("*token*")] + [path.unlink() for path in model.glob("*.model")]
    ),
    "a side file that is a link": lambda model: (model / "vocab.json").symlink_to("/etc/passwd"),
}
