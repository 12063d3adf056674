"""Two processes that talk by gloo: the numbers of one, one that writes, a resume by another number, and one that is gone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from promptmix.engine import load_checkpoint
from promptmix.parallel import launch
from tests import forked
from tests.parallel import session

ROOT = Path(__file__).resolve().parents[2]


def second(words):
    from tests.parallel import session  # with a promptmix of its own

    return session.second(words)


@pytest.fixture(scope="module")
def ended(room, tmp_path_factory):
    """Everything done by one process and by two, of which this one is the first; the folder, and what methods gave in both."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, here in {"toy": "toy", "clip.safetensors": "flat.safetensors"}.items():
        (folder / name).symlink_to(room / here)
    alone = {name: session.few_steps(folder, name) for name in session.METHODS}
    session.train(folder, folder / "1 alone")
    session.train(folder, folder / "1 to 2", stop=True)
    session.protocol(folder, folder / "1 protocol")
    own = {"WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "PROMPTMIX_TIMEOUT": "60", launch._OURS: str(folder / "meeting")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**own, "RANK": "0"}.items():
            patch.setenv(name, value)
        patch.setattr(launch, "leave_quietly", lambda: None)
        other = forked.Forked([str(folder)], ROOT, {**os.environ, "RANK": "1"}, second)
        try:
            both, *heard = session.together(folder)
        finally:
            said, errors = other.communicate(timeout=session.TIMEOUT)
            sys.stderr.write(errors)
    session.train(folder, folder / "2 to 1")
    return folder, alone, both, heard, said, other.returncode


@pytest.mark.parametrize("name", session.METHODS)
def test_two_processes_learn_what_one_does(ended, name):
    _, alone, both, *_ = ended
    assert list(alone[name]) == list(both[name])
    for key, one in alone[name].items():
        assert (one - both[name][key]).abs().sum() <= 1e-4 * one.abs().sum() + 1e-5, key


def run_of(folder: Path):
    state = load_checkpoint(folder / "prompt_learner" / "model.pth.tar-2")["state_dict"]
    return json.loads((folder / "results.json").read_text()), state, np.load(folder / "predictions.npz")


@pytest.mark.parametrize("name", ["1 to 2", "2 to 1"])
def test_a_training_goes_on_with_another_number_of_processes(ended, name):
    (one, learned, said), (other, theirs, answers) = run_of(ended[0] / "1 alone"), run_of(ended[0] / name)
    assert one["metrics"].keys() == other["metrics"].keys() == {"val", "test"}
    assert all(one["metrics"][part] == pytest.approx(other["metrics"][part]) for part in one["metrics"])
    assert all(torch.allclose(value, theirs[key], atol=1e-5) for key, value in learned.items())
    assert list(said["path"]) == list(answers["path"]) and np.array_equal(said["top_class"], answers["top_class"])
    assert np.allclose(said["top_probability"], answers["top_probability"], atol=1e-4)


@pytest.mark.parametrize("part", ["base", "new"])
def test_a_protocol_gives_the_numbers_of_one_process(ended, part):
    one, two = (json.loads((ended[0] / name / part / "results.json").read_text()) for name in ("1 protocol", "2 protocol"))
    assert one["metrics"]["test"] == pytest.approx(two["metrics"]["test"]) and "--devices" in two["replay"]


def test_numbers_of_other_processes_are_not_said_to_be_replayed(ended):
    replays = {name: run_of(ended[0] / name)[0]["replay"] for name in ("1 alone", "2 together", "2 to 1")}
    assert replays["1 alone"] and "--devices" not in replays["1 alone"] and not replays["2 to 1"]
    place = replays["2 together"].index("--devices")
    assert replays["2 together"][place + 1] == "2"


def test_one_process_writes_and_the_other_is_quiet(ended):
    folder, *_, said, _ = ended
    assert said.split(session.RUN)[1:] == [""]
    assert {path.name for path in (folder / "1 to 2").iterdir()} == {path.name for path in (folder / "1 alone").iterdir()}
    assert len((folder / "1 to 2" / "log.txt").read_text().split("=> result")) == 3  # of val and of test: each said once


def test_a_process_that_is_gone_ends_the_training_in_one_line(ended):
    *_, (_, gone), _, code = ended
    assert code == 9
    assert gone.startswith("another process of this training is gone") and "\n" not in gone


def test_what_is_computed_beside_the_towers_is_refused(ended):
    *_, (refused, _), _, _ = ended
    assert refused.startswith("the tests comes to different numbers in the 2 processes of --devices") and "\n" not in refused
