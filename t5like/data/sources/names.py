"""Short names of a run's sources, for metrics and printed tables: `data.source_names`, or names that distinguish them.

    | data.source                                         | names            |
    |-----------------------------------------------------|------------------|
    | text:/home/me/wiki/**/*.txt, text:/home/me/books/*  | wiki, books      |
    | jsonl:wiki/train.jsonl.gz, jsonl:books/train.jsonl  | wiki, books      |
    | text:a/x.txt, text:b/x.txt, text:b/y.txt            | a-x, b-x, y      |
    | tfds:c4/en:3.1.0, hf:allenai/c4/de, python_stdlib   | c4-en, c4-de, python_stdlib |
    | reasoning_gym:gcd?size=100, reasoning_gym:lcm         | gcd, lcm         |

Called by `pipeline`, `train` and the command line. Names contain only letters, digits, ``_``, ``-`` and ``.``, because
they become parts of the metrics' names.
"""

import re
from collections.abc import Sequence

from t5like.config.schema import DataConfig

LONGEST = 40  # characters of a derived name
_ENDING = re.compile(r"(\.(txt|md|jsonl|ndjson|json|tsv|csv|parquet|gz|zst|bz2|xz))+$", re.IGNORECASE)


def source_names(data: DataConfig) -> tuple[str, ...]:
    """One name for each entry of `data.source`, all different."""
    if data.source_names:
        return data.source_names
    parts = [tuple(_parts(spec)) for spec in data.source]
    unique = list(dict.fromkeys(parts))
    name_of = dict(zip(unique, _distinguish(unique), strict=True))
    names = [name_of[each] for each in parts]
    uses: dict[str, int] = {}
    for index, name in enumerate(names):  # number the repetitions of equal entries
        uses[name] = uses.get(name, 0) + 1
        if uses[name] > 1:
            names[index] = f"{name}-{uses[name]}"
    return tuple(names) if len(set(names)) == len(names) else tuple(f"source{n}" for n in range(1, len(names) + 1))


def _parts(spec: str) -> list[str]:
    """Candidates for parts of a source's name, the most informative last: its type, its folders, its file."""
    source_type, _, rest = spec.partition(":")
    if source_type == "reasoning_gym":
        rest = rest.partition("?")[0]  # without its parameters
    if source_type in ("tfds", "task") or (source_type == "hf" and re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", rest)):
        words = rest.split("/")
        owner = words[:1] if source_type == "hf" and len(words) > 1 else []
        words = [*owner, "-".join(word.partition(":")[0] for word in words[len(owner) :])]
    else:
        words = re.split(r"[/\\]", rest)
        if re.fullmatch(r"\*+\.[\w.]+", words[-1]):  # its folder is more informative than *.txt
            words = [words[-1], *words[:-1]]
    cleaned = [re.sub(r"[^\w.-]+", "_", re.sub(r"[*?\[\]{}]+", "", _ENDING.sub("", word))) for word in words]
    return [source_type, *(word for each in cleaned if (word := each.strip("._-")[-LONGEST:]))]


def _distinguish(sources: Sequence[Sequence[str]]) -> list[str]:
    """The last part that differs between sources; sources that are still equal get a part before it that differs."""
    while len(sources) > 1 and len({parts[-1] for parts in sources}) == 1 and min(map(len, sources)) > 1:
        sources = [parts[:-1] for parts in sources]
    names = [parts[-1] for parts in sources]
    for name in {name for name in names if names.count(name) > 1}:
        equal = [index for index, each in enumerate(names) if each == name]
        if all(len(sources[index]) > 1 for index in equal):
            for index, before in zip(equal, _distinguish([sources[index][:-1] for index in equal]), strict=True):
                names[index] = f"{before}-{name}"
    return names
