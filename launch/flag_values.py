"""Values of the flags of `t5like launch` as the types of `JobSpec`: durations, variables, secrets, mounts, images.

Each function takes the flag's name, for its message, and its text; all raise ConfigError. Called by `launch.options`.
"""

import os
import re
from collections.abc import Mapping

from launch.job import Mount, Secret, check_name, check_text
from t5like.config.field_types import Range
from t5like.errors import ConfigError, shown

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
VARIABLE = "[A-Za-z_][A-Za-z0-9_]*"
# A word of a variable's name, between underscores, that ends so: WANDB_API_KEY, PGPASSWORD; TOKENIZERS_PARALLELISM not.
SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY|CREDENTIAL)S?(_|$)|(^|_|PG|DB)PASS$", re.IGNORECASE
)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")  # as in a proxy: http://user:password@proxy:3128
REFERENCES = {  # where a backend has the value of a secret, after its name in a message
    "kubernetes": "=my-secret/key, a Secret of the namespace and one of its keys",
    "tpu_vm": "=my-secret, the name in Secret Manager",
}
RANKS = ("T5LIKE_COORDINATOR", "T5LIKE_NUM_PROCESSES", "T5LIKE_PROCESS_ID")  # each process has its own


def duration(flag: str, text: str) -> int:
    """Return seconds of a text such as ``90s``, ``45m``, ``12h``, ``2d`` or ``1d12h``; 0 for ``0``."""
    parts = re.findall(r"([0-9]{1,9})([smhd])", text)
    if text != "0" and (not parts or "".join(map("".join, parts)) != text):
        raise ConfigError(
            f"--{flag}={shown(text)[1:-1]} must be a duration with units d, h, m, s; use --{flag}=12h or --{flag}=45m"
        )
    return sum(int(number) * SECONDS[unit] for number, unit in parts)


def number(flag: str, text: str, limits: Range, example: str) -> int:
    """Return a whole number in a range."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) not in limits:
        raise ConfigError(f"--{flag}={shown(text)[1:-1]} must be a whole number, {limits}; use --{flag}={example}")
    return int(text)


def switch(flag: str, text: str) -> bool:
    """Return whether a switch is on; a flag without value is ``true``."""
    if text not in ("true", "false"):
        raise ConfigError(f"--{flag}={shown(text)[1:-1]} must be true or false; use --{flag}")
    return text == "true"


def variable(flag: str, text: str, backend: str, environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Return name and value of ``NAME=VALUE``, or of ``NAME`` with its current value."""
    name, equals, value = text.partition("=")
    use = f"use --secret={name}{REFERENCES.get(backend, '')}"
    check_name(f"--{flag}", name, pattern=VARIABLE, example=f"--{flag}=NAME=VALUE or --{flag}=NAME")
    if SECRET_NAME.search(name):
        raise ConfigError(
            f"--{flag}={name} has the name of a secret, and its value would be written into the job; {use}"
        )
    if name in RANKS:
        raise ConfigError(f"--{flag}={name} is set for each process by the launcher; leave it out")
    if not equals:
        if name not in environment:
            raise ConfigError(f"--{flag}={name} is not set in this shell; use --{flag}={name}=VALUE")
        value = environment[name]
    if PASSWORD_IN_URL.search(value):
        raise ConfigError(f"--{flag}={name} is a URL with a password, which would be written into the job; {use}")
    return name, check_text(f"--{flag}={name}", value)


def label(flag: str, text: str) -> tuple[str, str]:
    """Return name and value of ``NAME=VALUE``."""
    name, equals, value = check_text(f"--{flag}", text).partition("=")
    if not equals:
        raise ConfigError(f"--{flag}={shown(text)[1:-1]} must be NAME=VALUE; use --{flag}={name}=VALUE")
    return name, value


def secret(flag: str, text: str) -> Secret:
    """Return the secret of ``NAME`` or ``NAME=REFERENCE``; the value is never read here."""
    name, _, reference = text.partition("=")
    check_name(f"--{flag}", name, pattern=VARIABLE, example=f"--{flag}=NAME or --{flag}=NAME=REFERENCE")
    return Secret(name, check_text(f"--{flag}={name}", reference, longest=512))


def mount(flag: str, text: str) -> Mount:
    """Return the storage of ``SOURCE:PATH`` or ``SOURCE:PATH:ro``."""
    check_text(f"--{flag}", text)
    read_only = text.endswith(":ro")
    source, _, path = text.removesuffix(":ro").rpartition(":")
    if not source or not path.startswith("/") or path == "/" or ".." in path.split("/"):
        raise ConfigError(
            f"--{flag}={shown(text)[1:-1]} must be SOURCE:PATH with an absolute path; use --{flag}=gs://BUCKET:/data, "
            f"--{flag}=pvc:CLAIM:/data or --{flag}=/scratch:/scratch:ro"
        )
    if not (source.startswith("/") or re.fullmatch(r"(gs|s3)://[^/].*|pvc:[^/:]+", source)):
        raise ConfigError(
            f"--{flag}={shown(text)[1:-1]} must begin with gs://BUCKET, s3://BUCKET, pvc:CLAIM or an absolute path; "
            f"use --{flag}=gs://BUCKET:{path}"
        )
    return Mount(source, path, read_only)


def image(flag: str, text: str) -> str:
    """Return a container image that has a tag or a digest, or is a file; a tag may not be left to a default."""
    check_text(f"--{flag}", text, longest=512)
    if text.startswith(("/", "./")) or text.endswith((".sif", ".sqsh")):
        return text
    if not re.fullmatch(r"[^\s@-][^\s@]*(@sha256:[0-9a-f]{64}|:[A-Za-z0-9_][A-Za-z0-9_.-]*)", text):
        example = text if re.fullmatch(r"[a-z0-9./-]+", text) else "registry.example/t5like"
        raise ConfigError(f"--{flag}={shown(text)[1:-1]} must end with a tag or a digest; use --{flag}={example}:1.0")
    return text
