"""Image features on disk: exact, shared, safe with several writers, bounded; cached views that replay the uncached run."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from promptmix.cli import main
from promptmix.config import validate
from promptmix.data.features.cache import FeatureCache, cache_folder, feature_key
from promptmix.data.features.views import CachedViews
from promptmix.data.reading.streams import get_streams, set_streams
from promptmix.engine import build_trainer, set_random_seed
from promptmix.errors import ConfigError
from promptmix.runs import results
from promptmix.runs.run import run
from tests.trainers.toy import shallow, toy_cfg

RANDOM = ["INPUT.TRANSFORMS", ("random_resized_crop", "random_flip", "randaugment", "normalize")]


@pytest.fixture
def config(room, tmp_path):
    def make(name, *opts):
        return toy_cfg(room, name, "INPUT.FEATURE_CACHE_DIR", str(tmp_path / "cache"), "OUTPUT_DIR", str(tmp_path / "out"), *opts)

    return make


@pytest.fixture
def trainer(config):
    def make(name, *opts):
        cfg = config(name, *opts)
        validate(cfg)
        set_random_seed(1)
        return shallow(build_trainer(cfg))

    return make


def files(tmp_path):
    return sorted((tmp_path / "cache").glob("*"))


def test_scores_are_the_same_numbers_with_and_without_the_cache(tmp_path, trainer, monkeypatch):
    seen = {}
    for way, opts in (("off", ["INPUT.FEATURE_CACHE", False]), ("first", []), ("again", [])):
        subject = trainer("CoOp", *opts)
        scores = []
        original = subject.model_inference
        monkeypatch.setattr(subject, "model_inference", lambda x, o=original, s=scores: s.append(o(x)) or s[-1])
        if way == "again":
            monkeypatch.setattr(subject.clip.image, "forward", None)  # no picture is encoded any more
        subject.test()
        seen[way] = torch.cat(scores), torch.get_rng_state()
        assert bool(files(tmp_path)) == (way != "off")
    for way in ("first", "again"):
        assert torch.equal(seen["off"][0], seen[way][0])
        assert torch.equal(seen["off"][1], seen[way][1])


@pytest.mark.parametrize("opts", [[], [*RANDOM, "INPUT.CACHED_VIEWS", 2]])
def test_features_of_any_shape_are_kept(tmp_path, trainer, monkeypatch, opts):
    """Patches ride behind the image's feature for heads that read them, in files of their own."""
    seen = {}
    for needs in (False, True):
        subject = trainer("CoOp", *opts, "OUTPUT_DIR", str(tmp_path / f"run{needs}"))
        monkeypatch.setattr(type(subject.model.head), "needs_tokens", needs)
        shapes = []
        original = subject.model.logits
        monkeypatch.setattr(subject.model, "logits", lambda x, t, o=original, s=shapes: s.append(x.shape) or o(x, t))
        given = []
        step = subject.model.step
        monkeypatch.setattr(subject.model, "step", lambda x, *rest, o=step, s=given: s.append(x.dim()) or o(x, *rest))
        subject.train()
        seen[needs] = [parameter.detach().clone() for parameter in subject.model.parameters()]
        assert {len(shape) for shape in shapes} == {2 + needs}
        assert set(given) == {2 + needs if "INPUT.CACHED_VIEWS" in opts else 4}
    for ours, theirs in zip(*seen.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(files(tmp_path)) == (4 if opts else 2)


def test_features_that_look_like_pictures_are_refused():
    with pytest.raises(ConfigError, match=r"shape \(3, 4, 5\) can't be told from pictures"):
        CachedViews(torch.zeros(1, 2, 3, 4, 5), [])


def test_methods_and_seeds_share_a_file_and_other_weights_do_not(tmp_path, trainer):
    trainer("CoOp").test()
    trainer("MoCoOp").test()
    trainer("ZeroshotCLIP", "SEED", 5).test()
    assert len(files(tmp_path)) == 1
    other = trainer("ZeroshotCLIP")
    next(other.clip.image.parameters()).mul_(1.01)
    other.test()
    trainer("ZeroshotCLIP", "INPUT.INTERPOLATION", "nearest").test()
    trainer("ZeroshotCLIP", "TRAINER.PREC", "bf16").test()
    assert len(files(tmp_path)) == 4


def test_a_changed_picture_or_an_unknown_transform_is_no_hit(tmp_path, trainer):
    subject = trainer("ZeroshotCLIP")
    source = subject.test_loader.dataset
    key = feature_key(subject.cfg, subject.clip.image, source.data_source, source.transform)
    assert key == feature_key(subject.cfg, subject.clip.image, source.data_source, source.transform)
    assert key != feature_key(subject.cfg, subject.clip.image, source.data_source[1:], source.transform)
    assert feature_key(subject.cfg, subject.clip.image, source.data_source, lambda x: x) is None
    pack = source.data_source[0].impath
    before = os.stat(pack)
    try:
        os.utime(pack, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
        assert key != feature_key(subject.cfg, subject.clip.image, source.data_source, source.transform)
    finally:
        os.utime(pack, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_methods_that_train_the_image_side_refuse_the_cache_only_when_asked(tmp_path, trainer):
    tune = ["TRAINER.MOCOOP.TUNE_LAYERNORM", True]
    trainer("MoCoOp", *tune).test()
    assert not files(tmp_path)
    with pytest.raises(ConfigError, match=r"INPUT.FEATURE_CACHE is True .* MoCoOp trains the image side"):
        trainer("MoCoOp", *tune, "INPUT.FEATURE_CACHE", True).test()


@pytest.mark.parametrize(("workers", "stay"), [(0, False), (2, False), (2, True)])
def test_as_many_views_as_epochs_are_the_uncached_inputs_bit_for_bit(tmp_path, trainer, workers, stay):
    opts = [*RANDOM, "OPTIM.MAX_EPOCH", 2, "DATALOADER.NUM_WORKERS", workers, "TEST.FINAL_MODEL", "best_val"]
    opts += ["DATALOADER.TRAIN_X.BATCH_SIZE", 5]  # leaves a smaller batch over
    seen, ends = [], []
    for views in (0, 2, 2):
        opts += ["DATALOADER.PERSISTENT_WORKERS", stay and views > 0]  # the uncached run always starts its workers anew
        subject = trainer("CoOp", *opts, "INPUT.CACHED_VIEWS", views, "OUTPUT_DIR", str(tmp_path / f"run{len(seen)}"))
        inputs = []
        original = subject.model.loss

        def loss(step, original=original, inputs=inputs):
            inputs.append((step.features.clone(), step.labels.clone()))
            return original(step)

        subject.model.loss = loss
        if len(seen) == 2:
            subject.clip.image.forward = None  # the views, and all test features, come from the disk
        subject.train()
        assert not subject.approximations
        seen.append(inputs)
        ends.append((torch.cat([p.detach().flatten() for p in subject.model.parameters()]), torch.get_rng_state()))
    for other in (1, 2):
        assert len(seen[0]) == len(seen[other]) == 4
        for (features, labels), (cached, cached_labels) in zip(seen[0], seen[other], strict=True):
            assert torch.equal(features, cached) and torch.equal(labels, cached_labels)
        assert torch.equal(ends[0][0], ends[other][0]) and torch.equal(ends[0][1], ends[other][1])


def test_fewer_views_than_epochs_are_named_in_the_results(tmp_path, config):
    opts = [*RANDOM, "OPTIM.MAX_EPOCH", 3, "INPUT.CACHED_VIEWS", 2]
    found = run(config("CoOp", *opts), quiet=True)
    assert found.approximations == ["INPUT.CACHED_VIEWS: 2 augmented views take turns over 3 epochs"]
    assert results.load(tmp_path / "out" / "results.json").approximations == found.approximations
    steady = run(
        config("CoOp", "OPTIM.MAX_EPOCH", 3, "INPUT.CACHED_VIEWS", 1, "OUTPUT_DIR", str(tmp_path / "steady")), quiet=True
    )
    assert steady.approximations == []


def test_random_states_can_be_stored():
    set_random_seed(3)
    torch.randn(5)
    streams = get_streams()
    import random

    import numpy as np

    random.gauss(0, 1)
    first = torch.rand(3), random.random(), np.random.rand(2).tolist()
    set_streams(streams)
    random.gauss(0, 1)
    again = torch.rand(3), random.random(), np.random.rand(2).tolist()
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:]


def test_the_oldest_go_first_and_damaged_files_are_misses(tmp_path):
    cache = FeatureCache(tmp_path, limit_gb=2.5e-5)
    for i, key in enumerate("abc"):
        cache.put(key, {"features": torch.full((2500,), float(i))}, key)
        os.utime(tmp_path / f"{key}.safetensors", (1000 + i, 1000 + i))
        if key == "b":
            assert cache.get("a") is not None  # now "b" is the oldest
    assert [entry.about for entry in cache.entries()] == ["a", "c"]
    assert cache.get("b") is None
    (tmp_path / "a.safetensors").write_bytes(b"half a file")
    assert cache.get("a") is None
    cache.put("a", {"features": torch.zeros(3)}, "a")
    assert torch.equal(cache.get("a")["features"], torch.zeros(3))
    cache.put("huge", {"features": torch.zeros(10_000)}, "more than the limit")
    assert cache.get("huge") is None


def test_writers_and_readers_at_once_never_see_half_a_file(tmp_path):
    expected = torch.arange(200_000.0)
    wrong = []

    def work(writes):
        cache = FeatureCache(tmp_path)
        for _ in range(15):
            if writes:
                cache.put("key", {"features": expected}, "")
            found = cache.get("key")
            if (writes and found is None) or (found is not None and not torch.equal(found["features"], expected)):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


def test_a_folder_that_can_not_be_written_costs_only_the_saving(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    FeatureCache(tmp_path / "file" / "cache").put("key", {"features": torch.zeros(3)}, "")
    assert "can't be kept" in capsys.readouterr().out


def test_the_command_lists_and_clears(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PROMPTMIX_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path / "features" and cache_folder("else").name == "else"
    FeatureCache(cache_folder()).put("key", {"features": torch.zeros(500_000)}, "five pictures")
    assert main(["cache"]) == 0
    assert "five pictures" in (shown := capsys.readouterr().out) and "1 file, 2.0 MB" in shown
    assert main(["cache", "clear"]) == 0
    assert "removed 1 file (2.0 MB)" in capsys.readouterr().out
    assert main(["cache", "list"]) == 0
    assert "0 files" in capsys.readouterr().out
    monkeypatch.delenv("PROMPTMIX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "promptmix" / "features"
