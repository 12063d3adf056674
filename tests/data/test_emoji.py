"""EmojiFamilies and EmojiConcepts."""

from __future__ import annotations

import random

import pytest

from promptmix.config import get_cfg
from promptmix.data.base import build_dataset
from promptmix.data.datasets.emoji import STYLES
from promptmix.data.reading.images import read_image
from promptmix.errors import ConfigError, UserError

pytestmark = pytest.mark.usefixtures("all_emoji")


def build(name: str, **settings):
    cfg = get_cfg()
    cfg.DATASET.NAME = name
    cfg.VERBOSE = False
    cfg.SEED = settings.pop("SEED", 1)
    for key, value in settings.items():
        node = cfg.DATASET.EMOJI if key in cfg.DATASET.EMOJI else cfg.DATASET
        node[key] = value
    random.seed(cfg.SEED)
    return build_dataset(cfg)


def members(items):
    return {item.impath.partition("::")[2] for item in items}


def test_families_by_default():
    dataset = build("EmojiFamilies")
    assert dataset.num_classes == 41
    assert dataset.classnames == sorted(dataset.classnames) == dataset.all_classnames
    assert {item.domain for item in dataset.train_x + dataset.test} == {STYLES.index("openmoji_color")}
    assert len(dataset.train_x) + len(dataset.val) + len(dataset.test) == 1166
    assert read_image(dataset.train_x[0].impath).size == (64, 64)


def test_no_emoji_is_in_train_and_test_across_styles():
    dataset = build("EmojiFamilies", SOURCE_DOMAINS=["openmoji_color", "openmoji_black"], TARGET_DOMAINS=["fluent_3d"])
    assert {STYLES[item.domain] for item in dataset.train_x} == {"openmoji_color", "openmoji_black"}
    assert {STYLES[item.domain] for item in dataset.test} == {"fluent_3d"}
    assert not members(dataset.train_x) & members(dataset.test)
    assert not members(dataset.val) & members(dataset.test)


def test_shots_and_validation():
    dataset = build("EmojiFamilies", NUM_SHOTS=4)
    assert len(dataset.train_x) == 4 * 41
    assert len(dataset.val) == 2 * 41


def test_base_and_new_share_no_class_and_keep_the_order():
    base, new = (build("EmojiFamilies", SUBSAMPLE_CLASSES=part, CLASS_ORDER="seeded", NUM_SHOTS=4) for part in ("base", "new"))
    assert (base.num_classes, new.num_classes) == (21, 20)
    assert base.classnames + new.classnames == base.all_classnames == new.all_classnames
    assert max(item.label for item in new.test) == 19


def test_seeded_order_depends_on_the_seed_alone():
    first, again, other = (build("EmojiFamilies", CLASS_ORDER="seeded", SEED=seed).classnames for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other)


def test_template_groups_cover_the_templates():
    dataset = build("EmojiFamilies")
    assert dataset.templates[0] == "a photo of a {}."
    assert [template for group in dataset.template_groups for template in group] == dataset.templates
    assert all(template.count("{}") == 1 for template in dataset.templates)


def test_concepts_across_styles():
    dataset = build("EmojiConcepts")
    assert dataset.num_classes == 150
    assert len(dataset.train_x) == 150
    assert len(dataset.test) == 450
    assert {STYLES[item.domain] for item in dataset.test} == set(STYLES) - {"openmoji_color"}


def test_novel_concepts_are_others():
    seen, novel = (build("EmojiConcepts", CONCEPTS=part, NUM_CONCEPTS=100).classnames for part in ("seen", "novel"))
    assert not set(seen) & set(novel)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("EmojiFamilies", {"SOURCE_DOMAINS": ["apple"]}, "openmoji_black"),
        ("EmojiConcepts", {"TARGET_DOMAINS": ["apple"]}, "openmoji_black"),
        ("EmojiConcepts", {"TARGET_DOMAINS": ["openmoji_color"]}, "can't be both"),
        ("EmojiConcepts", {"SOURCE_DOMAINS": list(STYLES)}, "can't be both"),
        ("EmojiConcepts", {"NUM_CONCEPTS": 5000}, "must be 2 to"),
        ("EmojiConcepts", {"CONCEPTS": "old"}, "seen, novel, all"),
    ],
)
def test_wrong_settings_are_refused(name, settings, says):
    with pytest.raises(UserError, match=says) as caught:
        build(name, **settings)
    assert isinstance(caught.value, ConfigError)
