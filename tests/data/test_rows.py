"""Features by picture: a picture is encoded once whatever split, seed or process asks, and the bits are those of a whole pass."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from promptmix.data.features import rows
from promptmix.data.features.cache import FeatureCache
from promptmix.data.features.reuse import Reuse, awaited, reused
from tests.trainers.toy import toy_trainer


@pytest.fixture
def ask(room, tmp_path):
    """Return a function that asks for the features of a test split through one cache; it tells what was done for them too."""

    def ask(classes, encode=None):
        trainer = toy_trainer(room, "ZeroshotCLIP", "DATALOADER.TEST.BATCH_SIZE", 4, classes=classes)
        encode = encode or trainer._encode_frozen
        whole = torch.cat([encode(batch["img"]) for batch in trainer.test_loader])
        before = reused()
        cache = FeatureCache(tmp_path / "cache")
        found = rows.shared_features(trainer.test_loader, rows.Kept(encode), trainer.cfg, cache, trainer.clip.image)
        return found, whole, reused() - before

    return ask


def test_splits_share_pictures_and_have_the_bits_of_a_whole_pass(ask):
    done = []
    for classes in ("base", "all", "all", "new"):  # 6, 10 and 4 pictures, by 4
        found, whole, reuse = ask(classes)
        assert torch.equal(found, whole)
        done.append((reuse.encoded, reuse.taken))
    assert done == [(6, 0), (6, 4), (0, 10), (2, 2)]
    assert "14 pictures encoded" in str(sum([Reuse(6, 0, 1.0), Reuse(8, 16, 1.0, 2.5)], Reuse()))
    assert str(Reuse()) == ""


def test_a_killed_encoding_loses_what_was_not_written_yet(ask, monkeypatch):
    monkeypatch.setattr(rows, "_LOST_AT_MOST", 0.0)
    done = []

    def killed(images):  # three batches without the cache, then the first one twice, to try whether places matter
        done.append(len(images))
        if len(done) == 6:
            raise KeyboardInterrupt
        return images.mean(dim=(2, 3))

    with pytest.raises(KeyboardInterrupt):
        ask("all", killed)  # 10 pictures, by 4
    found, whole, reuse = ask("all", lambda images: images.mean(dim=(2, 3)))
    assert torch.equal(found, whole) and (reuse.encoded, reuse.taken) == (6, 4)


def test_seconds_without_a_batch_are_counted():
    def read():
        time.sleep(0.03)
        yield 1
        yield 2

    before, begin = reused(), time.monotonic()
    for _ in awaited(read()):
        time.sleep(0.05)  # encoding, which is none of them
    assert 0.03 <= (reused() - before).waited <= time.monotonic() - begin - 0.1
    assert "encoded in 2.0 s (0.5 s waiting for them)" in str(Reuse(6, 0, 2.0, waited=0.5))


def test_methods_that_read_raw_features_share_them_with_the_others(room, tmp_path):
    opts = ["INPUT.FEATURE_CACHE", True, "INPUT.FEATURE_CACHE_DIR", str(tmp_path / "both"), "TEST.PER_CLASS_RESULT", False]
    before, done = reused(), []
    for name in ("CLIPAdapter", "ZeroshotCLIP"):
        toy_trainer(room, name, *opts).test()
        done.append(((reused() - before).encoded, (reused() - before).taken))
    assert done[0][0] > 0 and done[1] == (done[0][0], done[0][0])
    trainer = toy_trainer(room, "ZeroshotCLIP", *opts)
    kept = trainer._kept()
    for batch in trainer.test_loader:
        assert torch.equal(kept.finish(kept.encode(batch["img"])), trainer._encode_frozen(batch["img"]))


def test_features_that_depend_on_the_place_in_a_batch_are_not_kept_by_picture(ask, tmp_path):
    def by_place(images):
        return images.mean(dim=(2, 3)) + torch.arange(len(images))[:, None]

    found, _, reuse = ask("base", by_place)
    assert found is None and reuse.encoded == 0 and not list((tmp_path / "cache").glob("*"))


def test_what_is_made_is_made_by_one_of_those_who_ask_at_once(tmp_path):
    calls, found = [], []

    def make():
        calls.append(1)
        time.sleep(0.2)
        return {"features": torch.rand(3)}

    def ask():
        found.append(FeatureCache(tmp_path).obtain("key", {"features": (3,)}, make, "", 3)["features"])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and all(torch.equal(one, found[0]) for one in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_owner_blocks_nobody(tmp_path):
    cache, (reader, writer) = FeatureCache(tmp_path), os.pipe()
    child = os.fork()
    if not child:
        with cache.claim("key"):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    made = cache.obtain("key", {"features": (2,)}, lambda: {"features": torch.ones(2)}, "", 2)
    assert torch.equal(cache.get("key")["features"], made["features"])
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]
