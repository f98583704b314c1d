"""The kind of each instruction of a compiled train step, and the line of t5like that it comes from.

A profile has the names of instructions alone. What they are is in the program's text (`hlo_text`): the opcode and what
is fused into it, and the Python stack that led to it. An instruction that several lines were fused into has the stack
of the last of them.

    optimizer            the optimizer, and the norms and tests of its updates
    attention            scores, softmax, weighted values and position bias; its projections are matmuls
    matmul               with what is fused into it; also a matmul that hides a collective
    gather, scatter      look-ups in the embedding, and their gradients
    copy                 no arithmetic: transposes, slices, changes of layout
    elementwise          everything else: norms, activations, dropout, the loss
"""

import functools
from typing import NamedTuple

from t5like.plan.hlo_cost import COLLECTIVES, FREE, Module
from t5like.plan.hlo_text import Frame, Instruction, frames_of, source_of, stack_frames

COLLECTIVE, CONTROL = "collective", "control"
KINDS = ("matmul", "attention", "elementwise", "optimizer", "gather, scatter", "copy", COLLECTIVE, CONTROL)

_ATTENTION = ("attend", "_attend", "attention_weights", "RelativeBias")  # functions of the model that begin so
_ATTENTION_LIBRARIES = ("fmha", "flash_attention")
_CALLED = ("t5like/model/kernels/", "Dense.__call__", "projections")  # of many lines, which say more
_OPTIMIZER = ("/optax/", "t5like/optim/optimizers.py", "t5like/optim/bad_steps.py")
_MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "copy", "dynamic-slice", "dynamic-update-slice", "iota",
    "get-tuple-element", "pad", "parameter", "reshape", "reverse", "slice", "transpose", "tuple",
}  # fmt: skip
_WITHOUT_TIME = {"bitcast", "constant", "get-tuple-element", "iota", "parameter", "tuple"}


class Operation(NamedTuple):
    """What an instruction is."""

    kind: str  # of `KINDS`
    op_name: str  # its path in the JAX program
    source: str  # t5like/model/mlp.py:31 in Mlp.__call__; empty if no line of t5like led to it


class Program:
    """The instructions of a compiled program (``compiled.as_text()``) by name."""

    def __init__(self, text: str):
        self._module, self._stacks = Module(text), stack_frames(text)
        self._places = {
            name: (computation, item)
            for computation in self._module.computations.values()
            for name, item in computation.items()
        }

    @functools.cache  # noqa: B019, the cache ends with the program
    def operation(self, name: str) -> Operation | None:
        """What an instruction is; None if the program has none of this name."""
        if name not in self._places:
            return None
        computation, item = self._places[name]
        frames = frames_of(item, self._stacks)
        return Operation(self._kind(computation, item, frames), source_of(item), _source(frames))

    def _kind(self, computation: dict[str, Instruction], item: Instruction, frames: tuple[Frame, ...]) -> str:
        inside = [each for _, each in self._module.inside_of(item)]
        opcodes = {each.op.removesuffix("-start").removesuffix("-done") for each in (item, *inside)}
        flops = self._module.flops(computation, item)
        if opcodes & {*COLLECTIVES} and not flops:
            return COLLECTIVE
        if item.op in FREE:
            return CONTROL
        if any(place in frame.file for frame in frames for place in _OPTIMIZER):
            return "optimizer"
        if any(frame.function.startswith(_ATTENTION) and "t5like/model" in frame.file for frame in frames):
            return "attention"
        if item.op == "custom-call" and any(name in item.rest for name in _ATTENTION_LIBRARIES):
            return "attention"
        if flops or opcodes & {"dot", "convolution"}:
            return "matmul"
        if opcodes & {"gather", "scatter"}:
            return "gather, scatter"
        work = opcodes - {"fusion", "call"}
        return "copy" if work <= _MOVES and not work <= _WITHOUT_TIME | {"broadcast"} else "elementwise"


def _source(frames: tuple[Frame, ...]) -> str:
    """The innermost line of t5like that calls no layer's own function, without the folder that it is installed in."""
    own = [frame for frame in frames if "/t5like/" in frame.file]
    telling = [frame for frame in own if not any(name in f"{frame.file} {frame.function}" for name in _CALLED)]
    for file, function, line in (telling or own)[:1]:
        return f"t5like/{file.rpartition('/t5like/')[2]}:{line} in {function.replace('<locals>.', '')}"
    return ""
