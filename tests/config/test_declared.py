"""Every declared key of every registered part: a value is taken and in range, or refused in one line that says how to fix it."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptmix.config import check_values, get_cfg, get_key, merge_opts, source_of, sources, validate
from promptmix.config.checks import check_pairs
from promptmix.config.declare import Setting, all_declared, all_defaults
from promptmix.errors import ConfigError, UserError

KEYS = sorted(all_declared(get_cfg()))
NODES = {node: list(keys) for node, keys in itertools.groupby(KEYS, lambda key: key.rpartition(".")[0])}

numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 1e308, 5e-324, -0.0])
too_long = st.just(0).map(lambda _: 10**5000)  # Python refuses to print it
leaves = st.none() | too_long | st.booleans() | numbers | st.text() | st.binary()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
written = (
    st.text()
    | numbers.map(lambda number: f"{number:g}" if isinstance(number, float) else "9" * 5000)
    | st.from_regex(r"[\(\[]?(-?[0-9]{1,3}(\.[0-9])?, ?){0,3}[\)\]]?", fullmatch=True)
)


def flat(value):
    return [one for item in value for one in flat(item)] if isinstance(value, (list, tuple)) else [value]


def is_in_range(value, setting: Setting) -> bool:
    """Tell whether every number lies within the declared bounds, without the code under test."""
    parts = flat(value)
    numeric = [part for part in parts if isinstance(part, (int, float)) and not isinstance(part, bool)]
    bounds = [
        all(number >= setting.low for number in numeric) if setting.low is not None else True,
        all(number <= setting.high for number in numeric) if setting.high is not None else True,
        all(number > setting.above for number in numeric) if setting.above is not None else True,
        all(number < setting.below for number in numeric) if setting.below is not None else True,
    ]
    return (
        all(bounds)
        and all(math.isfinite(number) for number in numeric)
        and (not setting.choices or all(part in setting.choices for part in parts))
        and (setting.length is None or len(value) == setting.length)
    )


def set_and_check(key, value, cfg=None, alone=None):
    """Return the tree (a new one, or ``cfg``) with ``value`` set, or None where it was refused as it should be.

    ``alone`` is the key's declaration, by which it is checked as ``check_values`` checks all; others are at their defaults.
    """
    cfg = get_cfg() if cfg is None else cfg
    try:
        merge_opts(cfg, [key, value], source="the test")
        if alone is None:
            check_values(cfg)
        else:
            alone.check(key, get_key(cfg, key), source_of(cfg, key))
            check_pairs(cfg, sources(cfg))
    except UserError as error:
        text = str(error)
        assert text
        assert "\n" not in text.strip()
        assert len(text) < 2000
        return None
    return cfg


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(key=st.sampled_from(KEYS), value=values | written)
def test_any_value_is_in_range_or_refused(key, value):
    cfg = set_and_check(key, value)
    if cfg is not None:
        found = get_key(cfg, key)
        assert type(found) is type(all_defaults(cfg)[key])
        assert is_in_range(found, all_declared(cfg)[key])


def around_the_bounds(cfg, key):
    """Set a key to what lies at, inside and outside of its bounds, and to what no key takes; it is at its default again then."""
    setting, default = all_declared(cfg)[key], all_defaults(cfg)[key]
    node, _, name = key.rpartition(".")
    assert setting.comment
    setting.check(key, default)
    bounds = [bound for bound in (setting.low, setting.high, setting.above, setting.below) if bound is not None]
    tried = [bound + step for bound in bounds for step in (-1, -0.5, 0, 0.5, 1)]
    tried += [math.nan, math.inf, -math.inf, 2**64, "nan", "inf", "-inf", "1e999", None, "", "\0", "\ud800", {}, [], "[" * 200]
    count, holds = setting.length or 1, isinstance(default, (list, tuple))
    for place, one in enumerate(tried):
        # A key of one value refuses a list whatever is in it.
        lists = ([one] * count, tuple([one] * count), [one] * (count + 1)) if holds or place == 0 else ()
        for value in (one, *lists, *([int(one)] if one in bounds else [])):
            if set_and_check(key, value, cfg, setting if place else None) is not None:
                assert is_in_range(get_key(cfg, key), setting), (key, value)
            (get_key(cfg, node) if node else cfg)[name] = default


@pytest.mark.parametrize("node", NODES)
def test_values_around_the_bounds(node):
    cfg = get_cfg()
    for key in NODES[node]:
        around_the_bounds(cfg, key)


@pytest.mark.parametrize("node", NODES)
def test_a_value_that_was_assigned_is_checked_too(node):
    cfg = get_cfg()
    for key in NODES[node]:
        node, _, name = key.rpartition(".")
        holder, default = get_key(cfg, node) if node else cfg, get_key(cfg, key)
        holder[name] = {"no": "value"}.values()
        with pytest.raises(ConfigError, match=key):
            check_values(cfg)
        holder[name] = default


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["OPTIM.LR", "-1"], r"OPTIM.LR is -1.0 \(set by command line\), which is not allowed; give 0 or more"),
        (["OPTIM.MAX_EPOCH", "0"], "give 1 or more"),
        (["SEED", str(2**32)], "4294967295 or less"),
        (["INPUT.SIZE", "(32,)"], "give 2 items, each 1 or more"),
        (["INPUT.TRANSFORMS", "['random_flop']"], "did you mean 'random_flip'"),
        (["INPUT.RRCROP_SCALE", "(0.9, 0.1)"], "smallest share first"),
        (["INPUT.GB_K", "4"], "odd"),
        (["OPTIM.NAME", "sgd", "OPTIM.SGD_NESTEROV", "True", "OPTIM.MOMENTUM", "0"], "momentum above 0"),
        (["OPTIM.LR_SCHEDULER", "multi_step"], "epochs from 1 on"),
        (["OPTIM.STEPSIZE", "()"], "STEPSIZE is empty"),
        (["DATASET.TEMPLATE_GROUPS", "[['a photo of a {}.', 'a {name}']]"], "template 'a {name}' must be text with one {}"),
        (["DATASET.TEMPLATE_GROUPS", "[[]]"], "is empty"),
        (["TEST.EVALUATOR", "Segmentation"], "unknown evaluator"),
        (["MODEL.HEAD.NAME", "mlp"], "CoOp does not read; leave it out"),
        (["MODEL.BACKBONE.NAME", "tiny-vit", "MODEL.BACKBONE.TAG", "openai"], "tiny-vit has one set of weights"),
        (["MODEL.BACKBONE.NAME", "ViT-B/16", "MODEL.BACKBONE.TAG", "opneai"], "did you mean 'openai'"),
        (["MODEL.BACKBONE.NAME", "ViT-B/61"], "unknown backbone"),
        (["TRAINER.KGCOOP.TEMPLATES", "({},)"], "each item must be a str"),
        (["DATASET.CSV.TEMPLATES", "['no place']", "DATASET.NAME", "CSV"], "one {} for the class name"),
    ],
)
def test_what_does_not_fit_is_refused_with_who_set_it(opts, words):
    cfg = get_cfg()
    merge_opts(cfg, ["TRAINER.NAME", "CoOp", "DATASET.NAME", "EmojiFamilies"], source="the test")
    merge_opts(cfg, opts)
    with pytest.raises(UserError, match=words):
        validate(cfg)


def test_every_list_says_what_its_items_are():
    cfg = get_cfg()
    declared = all_declared(cfg)
    lists = [key for key, default in all_defaults(cfg).items() if isinstance(default, (list, tuple))]
    assert len(lists) > 40 and [key for key in lists if declared[key].items is None] == []


def test_text_stays_as_typed():
    cfg = get_cfg()
    merge_opts(cfg, ["DATASET.ROOT", "007", "OUTPUT_DIR", "1e3", "DATASET.NAME", "'quoted'"])
    assert (cfg.DATASET.ROOT, cfg.OUTPUT_DIR, cfg.DATASET.NAME) == ("007", "1e3", "quoted")
    assert source_of(cfg, "DATASET.ROOT") == "command line"
