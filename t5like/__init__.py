"""t5like: T5-like language models in JAX. Importing the package imports nothing else, so it costs nothing.

    import t5like

    run = t5like.load("runs/tiny")
    print(run.generate("The <extra_id_0> of the program."))

`load` and `Run` are the Python interface (`t5like.run`). They are imported when they are first used, and JAX with them.
Commands are in `t5like.cli`, exceptions in `t5like.errors`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5like.run import Run, load

__version__ = "0.1.0"
__all__ = ["Run", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from t5like import run

        return getattr(run, name)
    raise AttributeError(f"module 't5like' has no attribute {name!r}")
