"""Short names of a run's sources, for metrics, lines and tables: `data.source_names`, or what tells the sources apart.

    | data.source                                         | names            |
    |-----------------------------------------------------|------------------|
    | text:/home/me/wiki/**/*.txt, text:/home/me/books/*  | wiki, books      |
    | jsonl:wiki/train.jsonl.gz, jsonl:books/train.jsonl  | wiki, books      |
    | text:a/x.txt, text:b/x.txt, text:b/y.txt            | a-x, b-x, y      |
    | tfds:c4/en:3.1.0, hf:allenai/c4/de, python_stdlib   | c4-en, c4-de, python_stdlib |

Called by `pipeline`, `train`, `commands`. Names have letters, digits, ``_``, ``-`` and ``.`` only, because they become
parts of the metrics' names.
"""

import re
from collections.abc import Sequence

from t5like.config.schema import DataConfig

LONGEST = 40  # characters of a name made here
_ENDING = re.compile(r"(\.(txt|md|jsonl|ndjson|json|tsv|csv|parquet|gz|zst|bz2|xz))+$", re.IGNORECASE)


def source_names(data: DataConfig) -> tuple[str, ...]:
    """One name for each of `data.source`, all different."""
    if data.source_names:
        return data.source_names
    parts = [tuple(_parts(spec)) for spec in data.source]
    different = list(dict.fromkeys(parts))
    name_of = dict(zip(different, _tell_apart(different), strict=True))
    names = [name_of[each] for each in parts]
    taken: dict[str, int] = {}
    for index, name in enumerate(names):  # of sources that are written alike
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            names[index] = f"{name}-{taken[name]}"
    return tuple(names) if len(set(names)) == len(names) else tuple(f"source{n}" for n in range(1, len(names) + 1))


def _parts(spec: str) -> list[str]:
    """What a source's name can be made of, the most telling part last: its kind, its folders, its file."""
    kind, _, rest = spec.partition(":")
    if kind in ("tfds", "task") or (kind == "hf" and re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", rest)):
        words = rest.split("/")
        owner = words[:1] if kind == "hf" and len(words) > 1 else []
        words = [*owner, "-".join(word.partition(":")[0] for word in words[len(owner) :])]
    else:
        words = re.split(r"[/\\]", rest)
        if re.fullmatch(r"\*+\.[\w.]+", words[-1]):  # its folder tells more than *.txt
            words = [words[-1], *words[:-1]]
    cleaned = [re.sub(r"[^\w.-]+", "_", re.sub(r"[*?\[\]{}]+", "", _ENDING.sub("", word))) for word in words]
    found = [word for each in cleaned if (word := each.strip("._-")[-LONGEST:])]
    return [kind, *found]


def _tell_apart(sources: Sequence[Sequence[str]]) -> list[str]:
    """The last part that not all sources share; where some are still alike, what tells those apart goes before it."""
    while len(sources) > 1 and len({parts[-1] for parts in sources}) == 1 and min(map(len, sources)) > 1:
        sources = [parts[:-1] for parts in sources]
    names = [parts[-1] for parts in sources]
    for name in {name for name in names if names.count(name) > 1}:
        alike = [index for index, each in enumerate(names) if each == name]
        if all(len(sources[index]) > 1 for index in alike):
            for index, before in zip(alike, _tell_apart([sources[index][:-1] for index in alike]), strict=True):
                names[index] = f"{before}-{name}"
    return names
