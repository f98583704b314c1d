"""Labels of Python code, by rules on its syntax tree: for the tasks `regression` and `token_classification`."""

import ast
import io
import tokenize

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)
LABELS = ("O", "B-CALL", "I-CALL", "B-VALUE", "I-VALUE", "B-KEYWORD", "B-LITERAL")


def complexity(code: str) -> int:
    """The cyclomatic complexity of code (McCabe 1976): 1 + its decisions.

    Those are branches, loops, exception handlers, and each `and` and `or` between two conditions.
    """
    nodes = list(ast.walk(ast.parse(code)))
    operators = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + sum(isinstance(node, BRANCHES) for node in nodes) + operators


def name_labels(code: str) -> tuple[list[str], list[str]]:
    """The tokens of an expression on one line, and a label of `LABELS` for each.

        os . path . join ( name , sep = 1 )
        B-CALL I-CALL I-CALL I-CALL I-CALL O B-VALUE O B-KEYWORD O B-LITERAL O

    A dotted name is one entity: CALL if it is called, else VALUE. KEYWORD is the name of an argument, LITERAL a number
    or string without white space. An expression with other strings has no labels: ([], []).
    """
    words, labels, starts = [], [], {}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            starts[token.start[1]] = len(words)
            words.append(token.string)
            labels.append("B-LITERAL" if token.type in (tokenize.NUMBER, tokenize.STRING) else "O")
    if any(len(word.split()) != 1 for word in words) or not code.isascii():
        return [], []
    inner: set[ast.AST] = set()  # parts of a longer dotted name
    for node in ast.walk(ast.parse(code, mode="eval")):  # a node comes before its parts
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg:
                    labels[starts[keyword.col_offset]] = "B-KEYWORD"
            if _is_dotted(node.func):
                _mark(labels, starts, node.func, "CALL")
                inner.update(ast.walk(node.func))
        elif node not in inner and _is_dotted(node):
            _mark(labels, starts, node, "VALUE")
            inner.update(ast.walk(node))
    return words, labels


def _is_dotted(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _mark(labels: list[str], starts: dict[int, int], node: ast.AST, kind: str) -> None:
    """Label all tokens of a node."""
    places = [place for start, place in starts.items() if node.col_offset <= start < node.end_col_offset]
    for place in places:
        labels[place] = f"{'B' if place == places[0] else 'I'}-{kind}"
