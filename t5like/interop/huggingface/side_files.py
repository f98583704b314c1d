"""The small files of a Hugging Face directory besides the weights: which are read, and which are kept for an export.

A directory from elsewhere must not name files of this machine: a symbolic link would copy what it points to into the
run, and from there into an export. Only regular files of known names inside the directory are read. Called by
`convert`.
"""

import json
from pathlib import Path

from t5like.errors import CheckpointError
from t5like.interop.huggingface import safetensors_files
from t5like.interop.huggingface.tensor_check import ImportRecord

RECORD = "import.json"  # the `ImportRecord`, beside the files that a run keeps
KEPT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_BYTES = 64 * 2**20  # of a file that is kept


def check_files(directory: Path) -> None:
    """Refuse a model directory with links to files elsewhere, pipes or devices among the files that are read.

    The cache of huggingface_hub is accepted: there a model's files are links to files of the same model.

    Raises:
        CheckpointError: names the file.
    """
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # models--NAME/snapshots/REVISION, beside models--NAME/blobs
        allowed.append(root.parents[1] / "blobs")
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"--input={directory} can't be read: {error.strerror}; check its permissions") from None
    for path in entries:
        if path.name not in KEPT_FILES and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(parent) for parent in allowed):
            raise CheckpointError(
                f"{path} is a link to {target}, outside of the model's directory; put the file itself there"
            )
        if not target.is_file():
            raise CheckpointError(f"{path} is not a regular file; download it again")


def keep_files(source: Path, target: Path, record: ImportRecord) -> None:
    """Copy the small files for a later export. References to code (auto_map) are removed: t5like never runs it."""
    target.mkdir()
    for path in (source / name for name in KEPT_FILES):
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            continue
        content = path.read_bytes()
        if b'"auto_map"' in content and path.suffix == ".json":
            values = safetensors_files.read_json(path)
            values.pop("auto_map", None)
            content = json.dumps(values, indent=2).encode()
        (target / path.name).write_bytes(content)
    (target / RECORD).write_text(json.dumps(record._asdict(), indent=1), encoding="utf-8")
