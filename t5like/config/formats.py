"""Formats of saved configs: how values of an older format become those of today's, and which fields have a new name.

`loader` reads a saved config by these rules. A command line, or a config file, that uses an old name is refused with a
message that contains the new name.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

FORMAT = 4  # of a saved config; older formats are upgraded (`UPGRADES`), newer ones refused

# Fields that had another name in format 3.
RENAMED = {
    "data.directory": "data.cache_directory",
    "data.document_borders": "data.cross_document_attention",
    "data.change_steps": "data.phase_boundaries",
    "data.whole_words": "data.whole_word_masking",
    "model.pair_head": "model.next_sentence_head",
    "model.rotary_base": "model.rotary.base",
    "model.rotary_scaling": "model.rotary.scaling",
    "model.rotary_factor": "model.rotary.factor",
    "model.rotary_original_length": "model.rotary.original_length",
    "model.rotary_low": "model.rotary.low_frequency_factor",
    "model.rotary_high": "model.rotary.high_frequency_factor",
    "model.rotary_slow": "model.rotary.beta_slow",
    "model.rotary_fast": "model.rotary.beta_fast",
    "model.rotary_attention": "model.rotary.attention_factor",
    "train.max_bad_steps": "train.max_skipped_updates",
    "train.wait_seconds": "train.process_timeout_seconds",
    "init_from.new": "init_from.reinitialize",
    "evaluate.choices": "evaluate.answer_choices",
}
# Values of renamed fields that changed with the name.
_VALUES = {"data.document_borders": {"concatenate": True, "segments": False}}


def renamed(name: str) -> str | None:
    """The message for a field's old name, as in ``data.change_steps is now data.phase_boundaries``; None for others."""
    if name not in RENAMED:
        return None
    values = [f"{str(new).lower()} for {old}" for old, new in _VALUES.get(name, {}).items()]
    return f"{name} is now {RENAMED[name]}" + (f"; use {', '.join(values)}" if values else "")


def original_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name with renamed fields as in format 3, so that the fingerprint of a config stays the same."""
    old_name = {new: old for old, new in RENAMED.items()}
    original = {}
    for name, value in values.items():
        old = old_name.get(name, name)
        old_value = {new: before for before, new in _VALUES.get(old, {}).items()}
        original[old] = old_value[value] if old_value else value
    return original


def _from_1(values: dict) -> dict:
    """Format 1 (until commit e76e9e6) had fewer fields. The defaults of the later ones do what it did without them."""
    return values


def _from_2(values: dict) -> dict:
    """In format 2 (until commit 323d2de) init_from.step=0 was the latest checkpoint; now it is that of step 0."""
    init = values.get("init_from")
    if isinstance(init, dict) and init.get("step") == 0:
        values = {**values, "init_from": {**init, "step": -1}}
    return values


def _from_3(values: dict) -> dict:
    """Format 4 has other names for some fields, and a section for those of rotary positions."""
    values = copy.deepcopy(values)
    for old, new in RENAMED.items():
        section, _, field = old.rpartition(".")
        if isinstance(values.get(section), dict) and field in values[section]:
            value = values[section].pop(field)
            value = _VALUES.get(old, {}).get(value, value) if isinstance(value, str) else value
            *parents, field = new.split(".")
            target: Any = values
            for parent in parents:
                target = target.setdefault(parent, {})
            target[field] = value
    return values


# The function that turns the values of a saved config of each older format into those of the next one.
UPGRADES: dict[int, Callable[[dict], dict]] = {1: _from_1, 2: _from_2, 3: _from_3}


def upgrade(values: Mapping, written: int) -> dict:
    """The values of a saved config of format `written`, in today's format."""
    upgraded = dict(values)
    for number in range(written, FORMAT):
        upgraded = UPGRADES[number](upgraded)
    return upgraded
