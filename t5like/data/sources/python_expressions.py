"""Read Python expressions in English, word by word: the targets of the task `translation` (see `python_tasks`).

The reading follows a rule, so it has one right answer, and it can be parsed back to the expression.
"""

import ast
import re


def gloss(tree: ast.expr) -> str:
    """Read an expression in English: ``len(self.data[i]) > 0`` is "whether the result of len with 1 argument the item
    i in data of self is more than 0". Every reading can be parsed back. "" if a part of the expression has no words."""
    try:
        return _read(tree)
    except LookupError:
        return ""


_BINARY = {
    ast.Add: "sum",
    ast.Sub: "difference",
    ast.Mult: "product",
    ast.Div: "quotient",
    ast.Mod: "remainder",
    ast.Pow: "power",
}
_COMPARE = {
    ast.Eq: "equals",
    ast.NotEq: "differs from",
    ast.Lt: "is less than",
    ast.LtE: "is at most",
    ast.Gt: "is more than",
    ast.GtE: "is at least",
    ast.Is: "is the same as",
    ast.IsNot: "is other than",
    ast.In: "is in",
    ast.NotIn: "is not in",
}
_READ_AS_WORDS = {"the", "whether", "both", "either", "minus"}  # names that would be ambiguous in a reading


def _read(tree: ast.expr) -> str:
    match tree:
        case ast.Name(name) if name not in _READ_AS_WORDS:
            return name
        case ast.Constant(value) if value is not ... and len(text := repr(value)) <= 20 and not re.search(r"\s", text):
            return text
        case ast.Attribute(value, name):
            return f"{name} of {_read(value)}"
        case ast.Subscript(value, ast.Slice(first, last, None)) if first or last:
            bounds = (f" {word} {_read(bound)}" for word, bound in (("from", first), ("to", last)) if bound)
            return f"the part{''.join(bounds)} in {_read(value)}"
        case ast.Subscript(value, index):
            return f"the item {_read(index)} in {_read(value)}"
        case ast.Call(function, positional, keywords):
            arguments = [_read(each) for each in positional]
            arguments += [f"{_keyword(each)} set to {_read(each.value)}" for each in keywords]
            return f"the result of {_read(function)} " + (
                f"with {_count(arguments, 'argument')}" if arguments else "alone"
            )
        case ast.List(items) | ast.Tuple(items):
            kind = type(tree).__name__.lower()
            return f"the {kind} of {_count([*map(_read, items)], 'item')}" if items else f"the empty {kind}"
        case ast.Dict([], []):
            return "the empty dict"
        case ast.BinOp(left, operation, right):
            return f"the {_BINARY[type(operation)]} of {_read(left)} and {_read(right)}"
        case ast.Compare(left, [operation], [right]):
            return f"whether {_read(left)} {_COMPARE[type(operation)]} {_read(right)}"
        case ast.BoolOp(ast.And(), [left, right]):
            return f"both {_read(left)} and {_read(right)}"
        case ast.BoolOp(ast.Or(), [left, right]):
            return f"either {_read(left)} or {_read(right)}"
        case ast.UnaryOp(ast.Not(), operand):
            return f"not {_read(operand)}"
        case ast.UnaryOp(ast.USub(), operand):
            return f"minus {_read(operand)}"
        case ast.IfExp(condition, then, otherwise):
            return f"if {_read(condition)} then {_read(then)} else {_read(otherwise)}"
    raise LookupError(type(tree).__name__)


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise LookupError("**")
    return keyword.arg


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) > 1)} {' and '.join(items)}"
