"""Dassl's own data sets of several domains, read from folders laid out as Dassl says."""

from __future__ import annotations

import pytest

from promptmix.dassl.config import get_cfg_default
from promptmix.dassl.data.sets import AVAI_C_TYPES, SETS
from promptmix.errors import UserError


def make(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def built(root, name, source=(), target=(), **node):
    cfg = get_cfg_default()
    cfg.DATASET.ROOT, cfg.DATASET.NAME = str(root), name
    cfg.DATASET.SOURCE_DOMAINS, cfg.DATASET.TARGET_DOMAINS = source, target
    for key, value in node.items():
        cfg.DATASET[key] = value
    return SETS[name](cfg)


def rows(items):
    return [(item.impath.rpartition("/")[2], item.label, item.domain, item.classname) for item in items or ()]


def test_folders_of_domains_and_splits(tmp_path):
    for domain in ("art", "clipart", "product"):
        make(tmp_path, *(f"office_home_dg/{domain}/{s}/{c}/{s}.jpg" for s in ("train", "val") for c in ("Bed", "Lamp")))
    data = built(tmp_path, "OfficeHomeDG", ("art", "product"), ("clipart",))
    assert data.classnames == ["bed", "lamp"]
    assert rows(data.train_x) == [
        ("train.jpg", label, domain, name) for domain in (0, 1) for label, name in ((0, "bed"), (1, "lamp"))
    ]
    assert len(data.val) == 4 and {item.impath.split("/")[-3] for item in data.test} == {"train", "val"}


def test_lists_of_pictures(tmp_path):
    splits = tmp_path / "pacs" / "splits"
    splits.mkdir(parents=True)
    for domain in ("photo", "sketch"):
        (splits / f"{domain}_train_kfold.txt").write_text(f"{domain}/dog/n02103406_4068-1.png 1\n{domain}/house/b c.png 6\n")
        (splits / f"{domain}_crossval_kfold.txt").write_text(f"{domain}/dog/d.png 1\n")
    data = built(tmp_path, "PACS", ("photo",), ("sketch",))
    assert rows(data.train_x) == [("n02103406_4068-1.png", 0, 0, "dog"), ("b c.png", 5, 0, "house")]
    assert rows(data.test) == [("b c.png", 5, 0, "house"), ("d.png", 0, 0, "dog")]  # the known bad file is left out


def test_the_target_domain_is_unlabelled_training_data_and_test(tmp_path):
    make(tmp_path, *(f"office31/{d}/{c}/{d}{c}.jpg" for d in ("amazon", "dslr") for c in ("bike", "mug")))
    data = built(tmp_path, "Office31", ("amazon",), ("dslr",))
    assert [len(part) for part in (data.train_x, data.train_u, data.test)] == [2, 2, 2] and data.val is None
    assert {item.impath for item in data.train_u} == {item.impath for item in data.test}


def test_labels_in_file_names(tmp_path):
    make(tmp_path, *(f"digit5/usps/{part}_images/{n}_{n % 3}.jpg" for part in ("train", "test") for n in range(6)))
    data = built(tmp_path, "Digit5", ("usps",), ("usps",))
    assert len(data.train_x) == 18 and len(data.test) == 6 and data.classnames == ["0", "1", "2"]


def test_few_labels(tmp_path):
    make(tmp_path, *(f"cifar10/{part}/{c}/{n}.png" for part in ("train", "test") for c in ("cat", "dog") for n in range(10)))
    data = built(tmp_path, "CIFAR10", NUM_LABELED=6, VAL_PERCENT=0.2)
    assert [len(part) for part in (data.train_x, data.train_u, data.val, data.test)] == [6, 10, 4, 20]
    with pytest.raises(UserError, match="NUM_LABELED is -1, but must be 1 or more"):
        built(tmp_path, "CIFAR10")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no folder .*office31/amazon; set --root"):
        built(tmp_path, "Office31", ("amazon",), ("dslr",))
    with pytest.raises(UserError, match="can't read the list of pictures .*clipart_train.txt"):
        built(tmp_path, "miniDomainNet", ("clipart",), ("real",))
    with pytest.raises(UserError, match="SOURCE_DOMAINS is empty, but must name some of: synthetic, real"):
        built(tmp_path, "VisDA17")
    with pytest.raises(UserError, match="unknown domain 'quickdraw' of miniDomainNet"):
        built(tmp_path, "miniDomainNet", ("quickdraw",), ("real",))
    assert len(AVAI_C_TYPES) == 19
    with pytest.raises(UserError, match="CIFAR_C_TYPE is '', but must be one of: brightness"):
        built(tmp_path, "CIFAR10C")
