"""Names from strangers in our output: no formula, no new column, no command to the terminal."""

from __future__ import annotations

import csv
import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmix.cli import main
from promptmix.files.text import counted, csv_cell, harmless, is_name, json_text, one_line, parse_json, table_cell
from promptmix.runs.results import RunResult
from promptmix.tables import tables
from promptmix.utils import get_logger

EVIL = "\x1b]0;owned\x07\x1b[2J=1+1|a\u202eb\x9b31m"


@given(st.text())
def test_what_is_harmless_stays(text):
    shown = harmless(text)
    assert not any(ord(c) < 32 and c not in "\t\n" or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert json.loads(json_text(json.dumps(text, ensure_ascii=False))) == text
    assert shown == text or shown != text and "\\" in shown


@pytest.mark.parametrize(
    ("text", "fits"), [("a\u200bb", True), ("猫\n", True), ("\u200b \x07", False), ("a\0", False), ("a\ud800", False)]
)
def test_names_can_be_seen(text, fits):
    assert is_name(text) == fits


def test_halves_of_characters_can_be_written():
    assert harmless("a\ud800").encode() and one_line("a\n# b\ud800") == "a # b\\ud800"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', '{"a": NaN}', "[-Infinity]", "[1e999]"])
def test_json_says_one_thing(text):
    with pytest.raises(ValueError, match="twice|not a number"):
        parse_json(text)


@pytest.mark.parametrize("text", ["plain", "é 猫 🐈", "a\tb\nc", "no|bar"])
def test_ordinary_names_are_left_alone(text):
    assert harmless(text) == text and csv_cell(text) == text


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd|x", "@SUM(A1)", "\tx", "  =1", "\uff1d1+1", "=cmd|' /C calc'!A0"])
def test_formulas_are_text(text):
    cell = csv_cell(text)
    assert isinstance(cell, str) and cell.startswith("'")


@pytest.mark.parametrize("value", [-1.5, 3, None, "-1.5", "+2e-3", "12"])
def test_numbers_stay_numbers(value):
    assert csv_cell(value) == value


@pytest.mark.parametrize("form", ["github", "pipe", "orgtbl", "jira", "presto", "simple"])
def test_cells_of_tables(form):
    cell = table_cell("a|b\nc", form)
    assert "\n" not in cell
    assert cell.replace("\\|", "").count("|") == (1 if form == "simple" else 0)


@pytest.mark.parametrize(
    ("form", "text"), [("unsafehtml", "<script>"), ("latex_raw", "\\input{/etc/passwd}"), ("asciidoc", "a|b")]
)
def test_cells_hold_no_markup(form, text):
    assert not any(word in table_cell(text, form) for word in ("<script", "\\input", "|"))


@pytest.mark.parametrize("form", ["html", "latex", "github"])
def test_a_legend_stays_what_it_is(form):
    told = tables.aggregate(
        [RunResult("CoOp", "x", metrics={"test": {"accuracy": 1.0}}, approximations=["a\n\\input{b}--->\n# c"])]
    )[:2]
    legend = tables.render(*told, fmt=form).splitlines()[-1]
    assert legend.endswith("# c -->" if form == "html" else "# c") and legend.count("-->") == (form == "html") or form != "html"
    assert legend.startswith({"html": "<!-- ", "latex": "% ", "github": "* "}[form])


def rows():
    run = RunResult(trainer=EVIL, dataset="=data", backbone="@x", shots=1, seed=1, metrics={"test": {"accuracy": 50.0}})
    run.title = "+title|more"
    return tables.aggregate([run])[:2]


@pytest.mark.parametrize("form", tables.FORMATS)
def test_no_format_passes_commands_on(form):
    text = tables.render(*rows(), fmt=form)
    assert not any(c in text for c in "\x1b\x07\x9b\u202e")


def test_csv_and_github():
    table = list(csv.DictReader(io.StringIO(tables.render(*rows(), fmt="csv"))))
    assert table[0]["dataset"] == "'+title|more" and table[0]["backbone"] == "'@x" and float(table[0]["mean"]) == 50
    lines = tables.render(*rows(), fmt="github").splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_logs_and_errors(capsys):
    get_logger().warning("class %s", EVIL)
    assert main(["train", "--config-file", EVIL]) == 2
    shown = capsys.readouterr()
    assert "\\x1b]0;owned\\x07" in shown.out + shown.err and not any(c in shown.out + shown.err for c in "\x1b\x07\x9b\u202e")
    assert logging.getLogger("promptmix").handlers


def test_counts_and_nouns_agree():
    assert [counted(number, "picture") for number in (0, 1, 1234)] == ["0 pictures", "1 picture", "1,234 pictures"]
    assert [counted(number, "class has", "classes have") for number in (1, 2)] == ["1 class has", "2 classes have"]
