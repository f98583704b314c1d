"""Span corruption as text: the spans of a generated text, and the prompt with its sentinels replaced by them."""

import re


def fill(prompt: str, answer: str) -> str:
    """Replace each sentinel of a prompt by its span in the generated answer; a sentinel without a span stays.

    fill("a <extra_id_0> c", "<extra_id_0> b <extra_id_1>") -> "a  b  c": spaces stay as the model generated them.
    """
    return re.sub(r"<extra_id_\d+>", lambda match: spans(answer).get(match[0], match[0]), prompt)


def completed(prompt: str, answer: str) -> str:
    """The prompt with its sentinels replaced, if it has any; else the generated answer."""
    return fill(prompt, answer) if "<extra_id_" in prompt else answer


def spans(answer: str) -> dict[str, str]:
    """The text after each sentinel of an answer, at its first occurrence."""
    _, *parts = re.split(r"(<extra_id_\d+>)", answer)
    span_of: dict[str, str] = {}
    for sentinel, text in zip(parts[::2], parts[1::2], strict=True):
        span_of.setdefault(sentinel, text)
    return span_of
