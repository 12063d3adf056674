"""Sentences about classes: the file's form, lookup by name, and what is refused in one line."""

from __future__ import annotations

import json

import pytest

from promptmix.data.descriptions import Descriptions, parse_descriptions, read_descriptions
from promptmix.errors import ConfigError, DataError
from tests.trainers.toy import CLASSES, toy_trainer

GOOD = {"Red  Fox": ["A fox is red.", "It has a tail."], "barn_owl": ["An owl hoots."]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_classes_are_found_whatever_their_capitals_underscores_and_spaces(tmp_path):
    found = read_descriptions(write(tmp_path / "pets.json", GOOD), "Pets")
    assert found.of(["red_fox", "Barn Owl"]) == (("A fox is red.", "It has a tail."), ("An owl hoots.",))
    assert found.as_lists(["red_fox", "cat"]) == {"red_fox": ["A fox is red.", "It has a tail."]}


def test_a_folder_holds_a_file_for_each_data_set(tmp_path):
    write(tmp_path / "Pets.json", GOOD)
    assert read_descriptions(str(tmp_path), "Pets").of(["red fox"])
    with pytest.raises(DataError, match=r"Cars\.json.*give a JSON file"):
        read_descriptions(str(tmp_path), "Cars")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"cat": ["a"], "cat": ["b"]}', "'cat' stands in it twice"),
        ({}, "holds no classes"),
        (["cat"], "not a table of classes"),
        ({"cat": "A cat."}, "class 'cat' has 'A cat.' where a list"),
        ({"cat": []}, r"class 'cat' has \[\] where"),
        ({"cat": ["A cat.", 7]}, "class 'cat' has 7 among"),
        ({"cat": ["A cat.", None]}, "class 'cat' has None among"),
        ({"cat": [" "]}, "class 'cat' has ' ' among"),
        ('{"cat": ["\\ud800"]}', "class 'cat' has .*ud800"),
        ({"": ["A cat."]}, "class name '' is not readable text"),
        ({"sea lion": ["a"], "Sea_Lion": ["b"]}, "'sea lion' and 'Sea_Lion'"),
    ],
)
def test_what_is_no_description_is_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(DataError, match=words) as refusal:
        read_descriptions(write(tmp_path / "d.json", content), "Pets")
    assert "\n" not in str(refusal.value) and "d.json" in str(refusal.value)


def test_missing_classes_are_named():
    found = Descriptions(GOOD, "d.json")
    with pytest.raises(DataError, match=r"d.json has no sentences for 1 of 2 classes: 'red foxes'; did you mean 'Red  Fox'\?"):
        found.of(["red foxes", "barn owl"])
    with pytest.raises(DataError, match=r"for 7 of 7 classes: 'c0', 'c1', 'c2', 'c3', 'c4', \.\.\.;"):
        found.of([f"c{i}" for i in range(7)])
    with pytest.raises(DataError, match="set DATASET.DESCRIPTIONS to a JSON file"):
        Descriptions({}).of(["cat"])
    with pytest.raises(DataError, match="data set Pets has none"):
        parse_descriptions({}, "data set Pets").of(["cat"])


def test_methods_may_ask_for_the_same_number_of_sentences():
    with pytest.raises(DataError, match="2 sentences for 'red fox' but 1 for 'barn owl'"):
        Descriptions(GOOD, "d.json").of(["red fox", "barn owl"], same_number=True)


def test_a_data_set_may_bring_its_own(room):
    assert toy_trainer(room, "CoOp").model.task.descriptions.of(CLASSES)[0][0] == "A barn owl in the morning."


def test_a_file_that_nobody_reads_is_refused(room, tmp_path):
    path = write(tmp_path / "toy.json", {name: ["It is one."] for name in CLASSES})
    with pytest.raises(ConfigError, match=r"DATASET.DESCRIPTIONS is .*toy.json', which nothing in CoOp reads"):
        toy_trainer(room, "CoOp", "DATASET.DESCRIPTIONS", path)
