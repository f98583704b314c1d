"""The rows and the statistics that `t5like inspect data` shows are those of the run, and each fault is named."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import smallest_flags, write_text

from t5like.config import loader
from t5like.data.objectives import denoising, masking, text_rows
from t5like.data.supervised.packing import ExampleRows
from t5like.inspect import data, data_page, data_text, step_data
from t5like.inspect.rows import fill


@pytest.fixture(scope="module")
def config(texts):
    """A function from fields to a config on a.txt; the token store is shared."""
    first, *flags = smallest_flags(texts)
    overrides = [flag.removeprefix("--config.").split("=", 1) for flag in flags]

    def make(**fields):
        more = [(name.replace("__", "."), str(value)) for name, value in fields.items()]
        return loader.load(first.removeprefix("--config="), [*map(tuple, overrides), *more])

    return make


def report(config, step=1, rows=3):
    return data.inspect_data(step_data.plan_of_config(config, step), rows)


def names(report):
    return [warning["name"] for warning in report["warnings"]]


def text_of(report, *, plain=True):
    return "\n".join("".join(part for part, _ in line) for line in data_text.lines(report, width=100, plain=plain))


# ---- Rows ----


def test_the_command_shows_the_rows_of_the_run(command, trained, tmp_path):
    code, out, err = command("inspect", "data", f"--workdir={trained}", "--step=2", "--rows=2", "--json")
    assert code == 0, err
    shown = json.loads(out)
    plan = step_data.plan_of_run(trained, 2)
    batch = step_data.open_data(plan).rows(np.arange(2))
    assert [row["row"] for row in shown["rows"]] == [8, 9] and shown["tokenizer"] == str(trained / "tokenizer.model")
    for index, row in enumerate(shown["rows"]):
        encoder, targets = row["sequences"]
        assert encoder["ids"] == batch.encoder_BS[index, : encoder["tokens"]].tolist()
        assert targets["ids"] == batch.targets_BL[index, : targets["tokens"]].tolist()
        assert targets["weighted"] == batch.weights_BL[index].sum()
        kept = [text for text, kind in zip(encoder["texts"], encoder["kinds"], strict=True) if kind == "sentinel"]
        assert kept == [f"<extra_id_{number}>" for number in range(len(kept))] and kept

    code, out, err = command("inspect", "data", f"--workdir={trained}", "--step=2", f"--html={tmp_path}/data.html")
    assert code == 0 and "\x1b" not in out, err
    assert "row 8  a/span_corruption" in out and "<extra_id_0>│" in out and "█" in out
    parser = Words()
    parser.feed((tmp_path / "data.html").read_text("utf-8"))
    assert {"Rows", "Warnings", "Source a"} <= set(parser.words) and parser.words.count("<extra_id_0>") >= 8


class Words(HTMLParser):
    """The texts of a page."""

    def __init__(self):
        super().__init__()
        self.words = []

    def handle_data(self, text):
        self.words.append(text)


def test_rows_after_a_rewind_and_another_batch_size_are_those_that_were_trained_on(trained, tmp_path, monkeypatch):
    workdir = shutil.copytree(trained, tmp_path / "run")
    meta = step_data.checkpoints_of(workdir, step_data.config_of(workdir)).meta
    rows = meta(2).history.rows.passing_over(1, 2).with_batch_size(2, 4)
    history = meta(2).history._replace(rows=rows)
    known = type(meta(2))._replace
    monkeypatch.setattr(
        step_data.checkpoints_of(workdir, step_data.config_of(workdir)).__class__,
        "meta",
        lambda self, step=None, own=meta: known(own(step), history=history),
    )
    assert step_data.plan_of_run(workdir, 1).first_row == 0
    after = step_data.plan_of_run(workdir, 2)
    assert (after.first_row, after.config.data.batch_size) == (16, 8) and "passed over 8 rows" in after.notes[0]
    assert step_data.plan_of_run(workdir, 3).first_row == 24
    (workdir / "bad_steps" / "2").mkdir(parents=True)
    record = {"step": 2, "checkpoint": 1, "first_row": 8, "batch_size": 8, "reason": "the loss is nan"}
    (workdir / "bad_steps" / "2" / "step.json").write_text(json.dumps(record))
    assert "step 2 was bad with rows 8 to 15 (the loss is nan)" in step_data.plan_of_run(workdir, 2).notes[1]


OBJECTIVES = {
    "span_corruption": {},
    "joined": {"model__architecture": "decoder", "data__cross_document_attention": False},
    "prefix_lm": {"data__objective": "prefix_lm"},
    "causal_lm": {"data__objective": "causal_lm", "model__architecture": "decoder"},
    "decoder prefix_lm": {"data__objective": "prefix_lm", "model__architecture": "decoder"},
    "mlm": {"data__objective": "mlm", "model__architecture": "encoder"},
    "mlm_nsp": {"data__objective": "mlm_nsp", "model__architecture": "encoder", "model__token_types": 2},
    "ul2": {
        "data__objective": "ul2",
        "data__inputs_length": 256,
        "data__targets_length": 160,
        "data__batch_size": 32,
        "tokenizer__num_sentinels": 60,
        "tokenizer__vocab_size": 440,
    },
}
ROW_CHECKS = {
    "targets_not_shifted",
    "text_not_restored",
    "padding_has_weight",
    "encoder_attends_to_padding",
    "rows_without_targets",
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_right_rows_of_every_objective_have_no_warning(config, name):
    shown = report(config(**OBJECTIVES[name]), rows=8)
    assert not ROW_CHECKS & set(names(shown)), shown["warnings"]
    assert len(shown["rows"]) == 8 and all(row["sequences"][0]["ids"] for row in shown["rows"])
    if name == "ul2":
        assert len({row["denoiser"] for row in shown["rows"]}) == 7
    if name == "mlm":
        assert "{" in text_of(shown)
    if name in ("decoder prefix_lm", "joined"):
        text, target = text_of(shown), shown["rows"][0]["sequences"][1]
        assert f"  targets  {target['weighted']} of {target['length']} positions have a target" in text
        assert "visible to all" in text and ")│(" not in text and " positions without a target)│" in text
        assert " positions without a target)</span>" in data_page.render(shown)
    data_page.render(shown)


def test_packed_examples_show_their_segments_and_shifted_targets_are_named(config, tmp_path, monkeypatch):
    lines = [json.dumps({"inputs": f"add {n}", "targets": f"ba de {n}"}) for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    fields = {"data__objective": "supervised", "data__targets_length": 40, "data__cache_directory": tmp_path}
    tokenizer = step_data.open_data(step_data.plan_of_config(config(), 1)).tokenizer_path
    shown = report(config(**fields, data__source=f"jsonl:{tmp_path}/sums.jsonl", tokenizer__path=tokenizer))
    encoder, targets = shown["rows"][0]["sequences"]
    assert len([each for each in encoder["segments"] if each["segment"]]) > 1
    assert {each["first_position"] for each in targets["segments"] if each["segment"]} == {0}
    assert not ROW_CHECKS & set(names(shown))
    shifted = ExampleRows.batch
    monkeypatch.setattr(ExampleRows, "batch", lambda *arguments: roll(shifted(*arguments), -1))
    assert "targets_not_shifted" in names(
        report(config(**fields, data__source=f"jsonl:{tmp_path}/sums.jsonl", tokenizer__path=tokenizer))
    )
    assert "segment 2: " in text_of(shown) and shown["batch"]["fill"]["encoder"]["tokens_per_segment"] < 16


# ---- Faults in rows ----


def roll(batch, offset):
    return batch._replace(targets_BL=np.roll(batch.targets_BL, offset, axis=1))


@pytest.mark.parametrize("name", ["span_corruption", "joined", "causal_lm"])
@pytest.mark.parametrize(("offset", "words"), [(1, "of the same position"), (-1, "2 positions before them")])
def test_labels_that_are_shifted_by_one_are_named(config, monkeypatch, name, offset, words):
    make_rows = text_rows.make_rows
    monkeypatch.setattr(text_rows, "make_rows", lambda *arguments: roll(make_rows(*arguments), offset))
    shown = report(config(**OBJECTIVES[name]))
    [text] = [each["text"] for each in shown["warnings"] if each["name"] == "targets_not_shifted"]
    assert text.startswith("the targets are not the decoder input shifted by one: ") and words in text
    assert "text_not_restored" in names(shown)


def test_masked_targets_that_are_shifted_are_named(config, monkeypatch):
    make_rows = text_rows.make_rows
    monkeypatch.setattr(text_rows, "make_rows", lambda *arguments: roll(make_rows(*arguments), 1))
    assert "text_not_restored" in names(report(config(**OBJECTIVES["mlm"])))


def test_gaps_with_the_targets_of_other_gaps_are_named(config, monkeypatch):
    swap = lambda batch: batch._replace(targets_BL=batch.targets_BL[::-1], decoder_BL=batch.decoder_BL[::-1])
    make_rows = text_rows.make_rows
    monkeypatch.setattr(text_rows, "make_rows", lambda *arguments: swap(make_rows(*arguments)))
    assert ROW_CHECKS & set(names(report(config()))) == {"text_not_restored"}


def test_padding_with_weight_and_padding_that_is_attended_to_are_named(config, monkeypatch):
    pairs = config(**OBJECTIVES["mlm_nsp"])
    right = masking.next_sentence

    def attended(*arguments):
        batch = right(*arguments)
        return batch._replace(encoder_segments_BS=np.ones_like(batch.encoder_segments_BS))

    monkeypatch.setattr("t5like.data.objectives.denoisers.next_sentence", attended)
    found = report(pairs)
    [text] = [each["text"] for each in found["warnings"] if each["name"] == "encoder_attends_to_padding"]
    assert text.startswith("the encoder attends to padding: ")
    monkeypatch.undo()

    make_batch = denoising._make_batch
    monkeypatch.setattr(
        denoising, "_make_batch", lambda targets, segments, count, *rest: make_batch(targets, segments, 99, *rest)
    )
    found = report(config(data__targets_length=20))
    assert "padding_has_weight" in names(found)


def test_rows_without_weight_are_named(config, monkeypatch):
    make_rows = text_rows.make_rows
    empty = lambda batch: batch._replace(weights_BL=batch.weights_BL * (np.arange(len(batch.weights_BL)) > 1)[:, None])
    monkeypatch.setattr(text_rows, "make_rows", lambda *arguments: empty(make_rows(*arguments)))
    assert "2 of 8 rows have no target" in " ".join(each["text"] for each in report(config())["warnings"])


def test_the_fill_of_a_batch_counts_tokens(config):
    batch = step_data.open_data(step_data.plan_of_config(config(data__targets_length=20), 1)).rows(np.arange(4))
    parts = fill(batch)
    assert parts["encoder"] == {"positions": 128, "tokens": 128, "share": 1.0}
    assert parts["targets"]["tokens"] == int(batch.weights_BL.sum()) == parts["decoder"]["tokens"] < 80


# ---- Faults in sources ----


def test_faults_of_a_source_are_named_with_number_and_remedy(flags, tmp_path):
    write_text(tmp_path / "good.txt", lines=300)
    lines = (tmp_path / "good.txt").read_text().splitlines()
    copied = "this very line is here again and again, as if somebody had copied it without looking at what was there"
    near = [f"{number} {line} {line} {line}" for number, line in enumerate(lines[:60] * 3)]
    (tmp_path / "bad.txt").write_text("\n".join([*[copied] * 300, *near, *["ba \x07 de"] * 3]) + "\n", "utf-8")
    (tmp_path / "other.txt").write_text("\n".join(f"{line} Привет мир {line}" for line in lines), "utf-8")
    fields = {
        "data.source": ",".join(f"text:{tmp_path}/{name}.txt" for name in ("good", "bad", "other")),
        "data.rates": "0.98,0.01,0.01",
        "data.cache_directory": tmp_path,
        "data.heldout_fraction": 0.02,
        "tokenizer.character_coverage": 0.98,
        "train.num_steps": 4000,
    }
    overrides = [tuple(flag.removeprefix("--config.").split("=", 1)) for flag in flags[1:]]
    shown = report(loader.load("tiny", [*overrides, *((name, str(value)) for name, value in fields.items())]))
    text = "\n".join(f"{each['name']}: {each['text']}" for each in shown["warnings"])
    assert "duplicates: bad: " in text and "documents are exact copies" in text and '"this very line is here' in text
    assert "duplicates: good" not in text
    assert "heldout_overlap: bad: " in text
    assert "control_characters: bad: " in text and "U+0007" in text
    assert "script_in_bytes: other: 56% of the Cyrillic letters" in text
    assert "repeated_source: good repeats 193." in text and "repeated_source: bad" not in text
    assert "few_heldout_documents: good: " in text and "data.heldout_fraction=" in text
    bad = shown["sources"][1]["train"]
    assert bad["oddest"][0]["nats_per_character"] >= bad["oddest"][-1]["nats_per_character"]
    assert sum(count for *_, count in bad["lengths"]["histogram"]) == bad["documents"] == bad["measured"]


def test_wrong_flags_are_refused_in_one_line(refused, trained, rl_flags):
    assert refused("inspect", "data")[0] == 2
    assert refused("inspect", "data", "--config=tiny", f"--workdir={trained}")[0] == 2
    code, message = refused("inspect", "data", "--config=tiny", "--step=0")
    assert code == 2 and "--step=0 must be at least 1" in message
    assert refused("inspect", "data", "--workdir=/nowhere")[0] == 4


def test_the_prompts_of_a_step_of_rl_are_shown(command, rl_flags):
    code, out, err = command("inspect", "data", *rl_flags, "--rows=2")
    assert code == 0, err
    assert "  prompt " in out and "sort" in out.replace("│", "")
    code, out, err = command("inspect", "data", *rl_flags, "--config.rl.method=dpo", "--rows=2", "--config.rl.rewards=")
    assert code == 0 and "  chosen" in out and "  rejected" in out, err
