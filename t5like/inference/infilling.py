"""A span-corruption answer as text: the spans behind its sentinels, and the prompt whose gaps they fill."""

import re


def fill(prompt: str, answer: str) -> str:
    """Put the spans of a span-corruption answer into the gaps of its prompt; a gap without an answer stays.

    fill("a <extra_id_0> c", "<extra_id_0> b <extra_id_1>") -> "a  b  c": text is kept as the model wrote it.
    """
    return re.sub(r"<extra_id_\d+>", lambda gap: spans(answer).get(gap.group(), gap.group()), prompt)


def spans(answer: str) -> dict[str, str]:
    """The text behind each sentinel of an answer, the first time that it occurs."""
    _, *pieces = re.split(r"(<extra_id_\d+>)", answer)
    found: dict[str, str] = {}
    for sentinel, text in zip(pieces[::2], pieces[1::2], strict=True):
        found.setdefault(sentinel, text)
    return found
