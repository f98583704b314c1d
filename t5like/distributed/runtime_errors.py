"""What errors of JAX's runtime mean, recognized by their text: they have no types of their own."""

import re

import jax

# Messages of gloo, NCCL, gRPC and JAX's coordination service when another process is gone.
PROCESS_LOST = re.compile(
    r"gloo|closed by peer|reset by peer|broken pipe|connection (refused|closed|reset)|heartbeat|coordination"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|barrier|NCCL|remote process|ABORTED",
    re.IGNORECASE,
)


def is_process_lost(error: BaseException) -> bool:
    """Whether the error means that another process is gone."""
    from_runtime = isinstance(error, jax.errors.JaxRuntimeError) or type(error).__name__ in (
        "ValueError",
        "XlaRuntimeError",
    )
    return from_runtime and PROCESS_LOST.search(str(error)) is not None


def is_timeout(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a key of the coordination service was not set within the time of a blocking read."""
    return "DEADLINE_EXCEEDED" in str(error)
