"""``predictions.npz``: what is kept of each picture, that it says what the scores say, and what a reader refuses."""

import hashlib
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from promptmix.cli import main
from promptmix.engine.samples import TEMPERATURES, SampleKeeper
from promptmix.errors import DataError
from promptmix.runs import results, samples

QUICK = ["--config-file", "configs/quickstart.yaml", "--seed", "1"]
SMALL = ["OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1", "DATASET.NAME", "EmojiConcepts", "DATASET.EMOJI.NUM_CONCEPTS", "8"]


def kept(scores, labels, most=3, paths=None, batch=7, **more):
    keeper = SampleKeeper(most)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        keeper.take(scores[part], labels[part], None if paths is None else paths[part], {k: v[part] for k, v in more.items()})
    return keeper.arrays({label: f"class {label}" for label in range(scores.shape[1])})


def write(path, arrays):
    np.savez_compressed(path, **arrays)
    return path


def made(seed=0, count=40, classes=6, **more):
    draw = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(count, classes, generator=draw), torch.randint(classes, (count,), generator=draw)


def test_what_is_kept_says_what_the_scores_say(tmp_path):
    scores, labels = made()
    found = samples.read(write(tmp_path / "p.npz", kept(scores, labels)))
    probabilities = scores.softmax(dim=1)
    assert found.top_class.shape == (40, 3) and list(found.classname) == [f"class {i}" for i in range(6)]
    assert np.allclose(found.top_probability, probabilities.sort(descending=True).values[:, :3], atol=1e-6)
    assert (found.correct == (scores.argmax(1) == labels).numpy()).all()
    for t in (TEMPERATURES[3], 1.0, TEMPERATURES[-1]):
        logs = (scores / t).log_softmax(dim=1)
        assert np.allclose(np.exp(-found.log_norm_at(t)), logs.exp().amax(1), atol=1e-5)
        assert np.allclose(found.own_gap / t - found.log_norm_at(t), logs[torch.arange(40), labels], atol=1e-4)
    between = (scores / 1.1).softmax(dim=1).amax(1)
    assert np.allclose(np.exp(-found.log_norm_at(1.1)), between, atol=5e-3)
    assert found.confusion().sum() == 40 and found.confusion().trace() == found.correct.sum()
    assert list(found.path[:8]) == [str(i) for i in range(8)]  # numbered through the batches


def test_a_run_keeps_its_test_and_a_mixture_its_routing(tmp_path):
    assert main(["train", "--trainer", "MoCoOp", *QUICK, "--output-dir", str(tmp_path), *SMALL]) == 0
    run = results.load(tmp_path / "results.json")
    path = tmp_path / "predictions.npz"
    assert run.files == {"predictions.npz": hashlib.sha256(path.read_bytes()).hexdigest()}
    found = samples.of_run(run)
    assert 100 * found.correct.mean() == pytest.approx(run.metrics["test"]["accuracy"])
    assert found.path[0].startswith("emoji/openmoji_black.zip::") and list(found.classname) == run.vocabulary["classnames"]
    assert found.router_logit.shape == (len(found), 5) and found.expert.shape == (len(found), 2)
    assert np.allclose(found.expert_weight.sum(1), 1, atol=1e-5)
    best = np.sort(found.router_logit.argsort(1)[:, -2:], axis=1)
    assert (np.sort(found.expert, axis=1) == best).all()
    assert path.stat().st_size < 400 * len(found)
    # Off by a key: a run that keeps nothing leaves nothing, also not what lay there before.
    assert main(["train", "--trainer", "MoCoOp", *QUICK, "--output-dir", str(tmp_path), *SMALL, "TEST.PREDICTIONS", "0"]) == 0
    assert not path.exists() and results.load(tmp_path / "results.json").files == {}


def test_trips_mixture_is_kept(tmp_path):
    flags = ["train", "--trainer", "TRIP", "--config-file", "configs/trainers/TRIP/tiny.yaml", "--seed", "1"]
    assert main([*flags, "--output-dir", str(tmp_path), *SMALL]) == 0
    found = samples.of_run(results.load(tmp_path / "results.json"))
    dense = np.exp(found.router_logit.astype(np.float64))
    assert np.allclose(dense.sum(1), 1, atol=1e-5)
    assert np.allclose(np.take_along_axis(dense, found.expert.astype(np.int64), 1), found.expert_weight, atol=1e-6)


def test_another_file_is_refused(tmp_path):
    assert main(["train", "--trainer", "ZeroshotCLIP", *QUICK, "--output-dir", str(tmp_path), "DATASET.NUM_SHOTS", "1"]) == 0
    run = results.load(tmp_path / "results.json")
    path = tmp_path / "predictions.npz"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\0" * 9)
    with pytest.raises(DataError, match=r"predictions.npz is not the file .* --eval-only"):
        samples.of_run(run)
    path.unlink()
    with pytest.raises(DataError, match="predictions.npz"):
        samples.of_run(run)


def test_pickles_are_never_read(tmp_path):
    class Loud:
        def __reduce__(self):
            return exit, (3,)

    arrays = kept(*made())
    arrays["path"] = np.array([Loud()] * 40, dtype=object)
    np.savez(tmp_path / "p.npz", allow_pickle=True, **arrays)
    assert pickle.dumps(Loud())  # it would have been one
    with pytest.raises(DataError, match="not a file of predictions"):
        samples.read(tmp_path / "p.npz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label", np.full(40, 6, np.int32)),
        ("label", np.full(39, 1, np.int32)),
        ("top_class", np.full((40, 3), -1, np.int32)),
        ("top_probability", np.zeros((40, 3), np.int32)),
        ("log_norm", np.zeros((40, 3), np.float32)),
        ("path", np.zeros(40, np.float32)),
        ("own_gap", np.full(40, np.nan, np.float32)),
        ("temperature", np.zeros_like(kept(*made())["temperature"])),
        ("expert", np.full((40, 2), 9, np.int32)),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(tmp_path, name, value):
    more = {"expert": torch.zeros(40, 2, dtype=torch.long), "expert_weight": torch.full((40, 2), 0.5)}
    arrays = kept(*made(), router_logit=torch.zeros(40, 4), **more)
    samples.read(write(tmp_path / "fine.npz", arrays))
    with pytest.raises(DataError, match="not a file of predictions"):
        samples.read(write(tmp_path / "p.npz", arrays | {name: value}))


def test_a_member_that_is_no_array_is_refused(tmp_path):
    arrays = kept(*made())
    write(tmp_path / "p.npz", {name: value for name, value in arrays.items() if name != "label"})
    with zipfile.ZipFile(tmp_path / "p.npz", "a") as pack:
        pack.writestr("label.npy", b"no array")
    with pytest.raises(DataError, match="label is missing or of another type"):
        samples.read(tmp_path / "p.npz")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.npz")
    with pytest.raises(DataError, match="no regular file"):
        samples.read(tmp_path / "p.npz", "0" * 64)


def test_what_claims_to_be_huge_is_refused(tmp_path):
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**20)})
    arrays = kept(*made())
    write(tmp_path / "p.npz", {name: array for name, array in arrays.items() if name != "log_norm"})
    with zipfile.ZipFile(tmp_path / "p.npz", "a") as pack:
        pack.writestr("log_norm.npy", data.getvalue())
    with pytest.raises(DataError, match="not a file of predictions"):
        samples.read(tmp_path / "p.npz")
