"""A sweep: the same numbers however it runs and however often it is killed; failures are told and cost one run each."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from promptmix.cli import main
from promptmix.data.features.reuse import Reuse
from promptmix.errors import ConfigError, UserError
from promptmix.parallel import launch
from promptmix.runs import backends, sweep
from promptmix.runs.execute import execute
from tests.runs import made
from tests.runs.made import jobs, options_of

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Run 3 methods x 2 data sets x 2 seeds, base to new, through local processes; return what it printed and its numbers."""
    done = made.sweep(made.make_sweep(folder, folder / "undisturbed"), "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return done.stdout, made.numbers(folder / "undisturbed")


def table(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_table_of_three_methods_and_two_data_sets(undisturbed, folder):
    shown, numbers = undisturbed
    assert len(numbers) == 3 * 2 * 2 * 2
    assert len({metrics["test"]["accuracy"] for metrics in numbers.values()}) >= 3
    rows = table(shown)
    assert len(rows) == 2 + 6 + 3 and all(" 1 2 " in row for row in rows[2:])
    assert sum("average of 2" in row for row in rows) == 3
    assert "[12/12]" in shown and "[12/12]" in (folder / "undisturbed" / "sweep.log").read_text()
    left = [
        path.name
        for path in (folder / "undisturbed").rglob("*")
        if path.name in ("console.txt", "error.txt") or "lock" in path.name
    ]
    assert not left
    # Methods and seeds read the same test pictures; which pictures a seed trains on is another matter.
    saved = next(line for line in shown.splitlines() if line.startswith("features: "))
    encoded, taken = (int(word.replace(",", "")) for word in saved.split() if word.replace(",", "").isdigit())
    assert 0 < encoded < taken and "which saved" in saved


def test_a_job_of_a_warm_process_has_the_numbers_of_a_new_one(undisturbed, folder, monkeypatch):
    """The jobs of a sweep are forked from one process; this one runs here, where other work went before."""
    path = made.make_sweep(folder, folder / "here", trainers=["KgCoOp"], datasets=["prints.yaml"], seeds=[2])
    torch.manual_seed(77)
    monkeypatch.chdir(folder)
    execute(sweep.read(str(path)).jobs[0])
    here = made.numbers(folder / "here")
    assert len(here) == 2
    assert here == {name: numbers for name, numbers in undisturbed[1].items() if name in here}


def test_forked_jobs_have_the_drivers_environment_and_random_numbers_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # not the real one
    np.random.seed(5)
    first = np.random.rand()
    np.random.seed(5)
    backends.be_fresh({"ONLY": "this"})
    assert os.environ == {"ONLY": "this"} and np.random.rand() != first


def job_of(data, trainer, seed=1):
    return backends.Job("base-to-new", trainer, data, f"out/{data}/{trainer}/{seed}", seed)


def test_what_shares_features_does_not_start_together():
    jobs = [job_of("a", "CoOp"), job_of("a", "KgCoOp"), job_of("b", "CoOp"), job_of("b", "KgCoOp")]
    assert backends.leaders_first(jobs) == [0, 2, 1, 3]
    turns = backends.Turns(jobs)
    assert [turns.take(), turns.take(), turns.take()] == [0, 2, 3]  # the last one rather than to stand still
    turns.ended(0, backends.Outcome())
    assert turns.take() == 1 and not turns


def test_every_kind_is_tried_and_then_the_longest_goes_first():
    jobs = [job_of("a", trainer, seed) for trainer in ("ZeroshotCLIP", "CoOp", "MoCoOp") for seed in (1, 2, 3)]
    turns = backends.Turns(jobs)
    assert [turns.take(), turns.take()] == [0, 8]
    turns.ended(0, backends.Outcome(seconds=50.0, reuse=Reuse(encoded=9, seconds=49.0)))
    assert turns.take() == 3
    turns.ended(8, backends.Outcome(seconds=9.0))
    turns.ended(3, backends.Outcome(seconds=4.0))
    assert [turns.take() for _ in range(6)] == [6, 7, 4, 5, 1, 2]


def test_killed_sweep_goes_on_and_gives_the_same_numbers(undisturbed, folder):
    output = folder / "killed"
    path = made.make_sweep(folder, output, datasets=["paints.yaml"])
    driver = made.start(path, "--jobs", "2")
    wait_for(lambda: len(list(output.rglob("results.json"))) >= 3 or driver.poll() is not None)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not members(driver.pid))  # runs end with their driver, before they could finish unseen
    finished = {found: found.stat().st_mtime_ns for found in output.rglob("results.json")}
    assert 3 <= len(finished) < 11
    done = made.sweep(path, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "finished before" in done.stdout
    assert made.numbers(output) == {name: found for name, found in undisturbed[1].items() if name[1] == "paints"}
    again = {found: stamp for found, stamp in finished.items() if found.stat().st_mtime_ns != stamp}
    assert not [found for found in again if found.parent.name == "base"]  # no training was repeated


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def members(session):
    """Return the processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_finished_sweep_runs_nothing_again(undisturbed, folder):
    done = made.sweep(folder / "undisturbed.yaml", "--dry-run")
    assert done.stdout.count("done ") == 12 and "to do" not in done.stdout


def test_runs_that_are_divided_have_the_numbers_of_one_device(undisturbed, folder):
    path = made.make_sweep(folder, folder / "divided", trainers=["KgCoOp"], datasets=["prints.yaml"], seeds=[2])
    done = made.sweep(path, "--jobs", "1", "--devices", "2")
    assert done.returncode == 0, done.stderr
    found = made.numbers(folder / "divided")
    assert len(found) == 2
    for name, numbers in found.items():
        assert numbers["test"] == pytest.approx(undisturbed[1][name]["test"])
    assert not list((folder / "divided").rglob("console*.txt"))


@pytest.fixture
def divided(monkeypatch, tmp_path):
    """Run a job in two processes, each of which does what is said of its rank."""
    monkeypatch.setattr(backends, "_context", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(launch, "GRACE", 0.2)

    def run(*whats):
        monkeypatch.setattr(backends, "work", lambda *_, **__: whats[launch.place()[0]]())
        job = backends.Job("base-to-new", "CoOp", "EmojiFamilies", str(tmp_path), 1)
        return next(iter(backends.local([job], backends.Options(devices=2), print)))[1]

    return run


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(launch._LEFT)


def hang():
    time.sleep(60)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (lambda: backends.Outcome(numbers={"base": 50.0}), lambda: backends.Outcome(), ""),
        (lambda: backends.Outcome("no such key"), leave, "no such key"),
        (leave, lambda: backends.Outcome("no picture 3.png"), "no picture 3.png"),
        (leave, kill, "process 2 of 2 was killed by signal 9 (out of memory?)"),
        (hang, kill, "process 2 of 2 was killed by signal 9 (out of memory?)"),
        (leave, hang, "process 2 of 2 did not answer"),
    ],
)
def test_a_divided_run_ends_with_what_one_of_its_processes_met(divided, first, second, words):
    outcome = divided(first, second)
    assert outcome.error == words and bool(outcome.numbers) == (not words)


@pytest.mark.parametrize(
    ("visible", "devices", "seen"),
    [
        ("", 1, ["0", "1", "2", "3"]),
        ("", 2, ["0", "1", "2", "3"]),
        ("3,5,7,9", 2, ["3", "5", "7", "9"]),
        ("3,5,7,9", 4, ["3", "5", "7", "9"]),
    ],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, tmp_path, visible, devices, seen):
    given = []

    class Context:
        Process = staticmethod(lambda target, args: given.append(args[3]) or SimpleNamespace(start=lambda: None, sentinel=0))
        Pipe = staticmethod(lambda duplex: (SimpleNamespace(), SimpleNamespace(close=lambda: None)))

    monkeypatch.setattr(backends, "_context", Context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    options = backends.Options(gpus=4, devices=devices)
    for slot in range(4 // devices):
        one = backends._Running(slot, slot)
        for rank in range(devices):
            backends._begin(one, jobs("CoOp")[0], options, rank, str(tmp_path))
    assert [environ["CUDA_VISIBLE_DEVICES"] for environ in given] == seen
    assert [environ.get("RANK") for environ in given] == (
        [None] * 4 if devices == 1 else [str(rank) for rank in range(devices)] * (4 // devices)
    )


@pytest.mark.parametrize(
    ("flags", "more", "words"),
    [
        ("--devices 0", {}, "--devices"),
        ("--devices 3", {}, "--devices 3, but this machine has 2 GPUs"),
        ("--devices 2", {"task": {"gpus": 0.5}}, "`task: gpus` is 0.5"),
        ("--devices 2", {"protocols": ["active"], "shots": [-1]}, "active works in rounds"),
    ],
)
def test_runs_that_can_not_be_divided_are_refused(tmp_path, monkeypatch, capsys, flags, more, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    path = made.make_sweep(tmp_path, tmp_path / "out", **more)
    assert main(["sweep", str(path), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "place", lambda: (0, 2))
    assert main(["sweep", str(made.make_sweep(tmp_path, tmp_path / "out"))]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "gpus", "wanted"), [("", 4, 4), ("--devices 2", 4, 2), ("--devices 3", 4, 1), ("", 0, 5)])
def test_so_many_runs_at_a_time_as_there_are_devices_for(tmp_path, monkeypatch, flags, gpus, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(backends, "cpus", lambda: 5)
    assert options_of(tmp_path, flags.split()).jobs == wanted


def test_failed_runs_are_told_and_the_others_go_on(folder):
    trainers = ["Raises", "ZeroshotCLIP", "Refuses", "Dies"]
    more = {"trainers": trainers, "seeds": [1], "datasets": ["paints.yaml"], "plugins": [str(HERE / "broken_plugin.py")]}
    done = made.sweep(made.make_sweep(folder, folder / "failing", **more), "--jobs", "1")
    assert done.returncode == 1
    assert "[4/4]" in done.stdout and "| ZeroshotCLIP" in done.stdout
    listed = done.stderr[done.stderr.index("3 of 4 failed") :]
    assert "ZeroDivisionError: a mistake in the method" in listed and "a file is missing; get it again" in listed
    assert "was killed by signal 9" in listed
    report = next((folder / "failing").rglob("error.txt"))
    assert "Traceback" in report.read_text()


def test_a_traceback_goes_through_no_link(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("promptmix.runs.execute.execute", fail)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "error.txt").symlink_to(tmp_path / "mine")
    outcome = backends.work(SimpleNamespace(place=tmp_path), torch.get_num_threads())
    assert "ZeroDivisionError" in outcome.error and (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainer": ["CoOp"]}, ["unknown key 'trainer'", "did you mean 'trainers'"]),
        ({"seeds": None}, ["seeds", "empty"]),
        ({"seeds": ["one"]}, ["seeds", "whole numbers"]),
        ({"protocols": ["base-to-now"]}, ["base-to-now", "did you mean 'base-to-new'"]),
        ({"trainers": [{"nam": "CoOp"}]}, ["trainers", "unknown key 'nam'"]),
        ({"trainers": ["CoOp", "CoOp"]}, ["twice", "label"]),
        ({"targets": {"cross-dataset": ["EuroSAT"]}}, ["targets.cross-dataset", "ignored"]),
        ({"trainers": [{"name": "CoOp", "label": "a"}, {"name": "CoOp", "label": "A"}]}, ["CoOp-a", "CoOp-A", "case"]),
        ({"trainers": [{"name": "CoOp", "label": "a"}, {"name": "CoOp", "label": "b"}]}, ["CoOp a", "CoOp b", "one run twice"]),
        ({"shots": [0, -1]}, ["0 shots", "-1 shots", "one run twice"]),
        ({"variants": {}}, ["variants is empty"]),
        ({"variants": {"": {}, "slow": {"OPTIM.LR": 0.1}}}, ["''", "variant or label"]),
        ({"variants": {"slow ": {}}}, ["'slow '", "variant or label"]),
        ({"set": {"OPTIM.LR": 1.0, "OPTIM": {"LR": 2.0}}}, ["OPTIM.LR appears twice"]),
        ({"variants": {"short": 3}}, ["variants.short", "mapping"]),
        ({"plugins": ["missing_plugin.py"]}, ["missing_plugin.py"]),
        ({"task": {"gpu": 1}}, ["task", "unknown key 'gpu'", "did you mean 'gpus'"]),
        ({"task": {"gpus": 2}}, ["task", "gpus is 2", "from 0 to 1"]),
        ({"task": {"cpus": 0}}, ["task", "cpus is 0", "1 or more"]),
        ({"task": {"gpus": "one"}}, ["task", "gpus", "number"]),
    ],
    ids=str,
)
def test_mistakes_in_a_sweep_file_are_named(tmp_path, change, words):
    path = made.make_sweep(tmp_path, tmp_path / "out", **change)
    with pytest.raises(UserError) as caught:
        sweep.read(str(path))
    assert all(word in str(caught.value) for word in words), caught.value


def test_yaml_that_builds_objects_is_refused(tmp_path):
    (tmp_path / "evil.yaml").write_text("output: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match=r"evil.yaml"):
        sweep.read(str(tmp_path / "evil.yaml"))


def test_wrong_setting_is_found_before_anything_runs(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = made.make_sweep(tmp_path, tmp_path / "out", set={"OPTIM.LRR": 1})
    assert main(["sweep", str(path)]) == 2
    assert "did you mean 'LR'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_variants_and_overrides_multiply(tmp_path):
    more = {
        "trainers": ["CoOp", {"name": "CoOp", "label": "long", "set": {"OPTIM": {"MAX_EPOCH": 9}}}],
        "variants": {"slow": {"OPTIM.LR": 0.001}, "fast": {"OPTIM.LR": 0.5}},
        "datasets": ["paints.yaml"],
        "seeds": [1],
        "shots": [1, 2],
    }
    found = sweep.read(str(made.make_sweep(tmp_path, tmp_path / "out", **more))).jobs
    assert len(found) == 2 * 2 * 2 and len({job.folder for job in found}) == 8
    last = next(job for job in found if job.variant == "long-fast" and job.shots == 2)
    assert Path(last.folder).parts[-3:] == ("CoOp-long-fast", "shots2", "seed1")
    settings = dict(zip(last.settings[::2], last.settings[1::2], strict=True))
    assert settings["OPTIM.MAX_EPOCH"] == 9 and settings["OPTIM.LR"] == 0.5


def test_shipped_sweep_takes_the_emoji_through_the_protocols():
    plan = sweep.read("configs/sweeps/emoji.yaml")
    tree = yaml.safe_load((made.ROOT / "configs" / "sweeps" / "emoji.yaml").read_text())
    assert {job.protocol for job in plan.jobs} == set(tree["protocols"])
    assert {job.dataset for job in plan.jobs} == {"EmojiFamilies", "EmojiConcepts"}
