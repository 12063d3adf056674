"""Sweeps on Ray and Slurm, which stand in here: what is asked of them, how jobs end, and what they can't do."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from promptmix.cli import main
from promptmix.errors import UserError
from promptmix.runs import backends, clusters, waves
from tests.runs import made
from tests.runs.made import jobs, options_of


class FakeJob:
    """Stands in for a job of submitit: runs when it is asked for."""

    job_id = "17"

    class paths:
        stderr = "17.err"

    def __init__(self, work, *arguments):
        self.work, self.arguments, self.looks, self.cancelled = work, arguments, 0, False

    def done(self):
        self.looks += 1
        return self.looks > 1

    def exception(self):
        return None if self.arguments[0].trainer != "Dies" else RuntimeError("Job failed\nslurmstepd: error: out of memory\n")

    def result(self):
        return backends.Outcome(numbers={"base": 50.0})

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def submitit(monkeypatch):
    """Stand in for the parts of submitit's API that the backend uses."""

    class Module:
        class AutoExecutor:
            def __init__(self, folder, cluster):
                Module.made = (folder, cluster)

            def update_parameters(self, **keys):
                if "colour" in keys:
                    raise NameError("Unknown argument 'colour'")
                Module.parameters = keys

            def batch(self):
                import contextlib

                return contextlib.nullcontext()

            def submit(self, *arguments):
                Module.jobs.append(FakeJob(*arguments))
                return Module.jobs[-1]

        jobs = []

    monkeypatch.setitem(sys.modules, "submitit", Module)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(clusters, "_POLL_SECONDS", 0.0)
    return Module


def test_slurm_queues_every_job_and_reads_how_each_ended(submitit):
    options = backends.Options(jobs=4, threads=2, slurm={"timeout_min": 60, "slurm_partition": "gpu"}, folder="out")
    begun = []
    found = dict(clusters.on_slurm(jobs("CoOp", "Dies"), options, begun.append))
    assert begun == [0, 1]
    assert submitit.made == (str(Path("out", "slurm")), "slurm")
    assert submitit.parameters["timeout_min"] == 60 and submitit.parameters["slurm_array_parallelism"] == 4
    assert submitit.parameters["cpus_per_task"] == 2
    assert found[0].numbers == {"base": 50.0}
    assert "out of memory" in found[1].error and "17.err" in found[1].error


@pytest.mark.parametrize(
    ("device", "share", "slurm", "asked"),
    [
        ("", None, {}, 1),
        ("cpu", None, {}, None),
        ("", 0.0, {}, None),
        ("cpu", 1.0, {}, 1),
        ("", None, {"slurm_gpus_per_node": "a100:1"}, None),
        ("", None, {"slurm_additional_parameters": {"gres": "gpu:1"}}, None),
    ],
)
def test_slurm_is_asked_for_a_gpu_once(submitit, device, share, slurm, asked):
    wanted = [replace(job, device=device) for job in jobs("CoOp")]
    list(clusters.on_slurm(wanted, backends.Options(threads=3, share=share, slurm=slurm), print))
    assert submitit.parameters.get("slurm_gpus_per_task") == asked and submitit.parameters["cpus_per_task"] == 3
    list(clusters.on_slurm(wanted, backends.Options(threads=3, share=share, slurm=slurm, devices=2), print))
    assert submitit.parameters.get("slurm_gpus_per_task") == (asked and 2) and submitit.parameters["cpus_per_task"] == 6


def test_slurm_gives_no_part_of_a_gpu(submitit):
    with pytest.raises(UserError, match="gpus is 0.5, and Slurm gives whole GPUs"):
        next(clusters.on_slurm(jobs("CoOp"), backends.Options(share=0.5), print))


@pytest.mark.parametrize(("gpus", "share", "asked"), [(2, None, 1), (0, None, 0), (2, 0.25, 0.25), (0, 0.25, 0.25)])
def test_ray_is_asked_for_part_of_a_gpu(monkeypatch, gpus, share, asked):
    class Ray:
        """Stands in for the parts of Ray's API that the backend uses."""

        asked: ClassVar[dict[str, float]] = {}

        @staticmethod
        def remote(**asked):
            Ray.asked = asked
            return lambda work: SimpleNamespace(remote=lambda *arguments: "job")

        init = shutdown = staticmethod(lambda *arguments, **options: None)
        cluster_resources = staticmethod(lambda: {"GPU": gpus})
        wait = staticmethod(lambda refs, num_returns: (refs, []))
        get = staticmethod(lambda ref: backends.Outcome(numbers={"base": 50.0}))

    monkeypatch.setitem(sys.modules, "ray", Ray)
    list(clusters.on_ray(jobs("CoOp"), backends.Options(threads=3, share=share), print))
    assert Ray.asked == {"num_cpus": 3, "num_gpus": asked, "max_retries": 0, "max_calls": 0}
    if asked in (0, 1):
        list(clusters.on_ray(jobs("CoOp"), backends.Options(threads=3, share=share, devices=2), print))
        assert Ray.asked == {"num_cpus": 6, "num_gpus": 2 * asked, "max_retries": 0, "max_calls": 0}


def test_ray_starts_once_for_all_rounds(monkeypatch):
    seen, left = [], [["0", "1"], ["2"], []]

    class Ray(SimpleNamespace):
        """Stands in for Ray, and notes what starts and ends."""

        def remote(self, **_):
            return lambda work: SimpleNamespace(remote=lambda job, *_: job.piece)

        def get(self, ref):
            seen.append(ref)
            return backends.Outcome(numbers={"part": 1.0})

    monkeypatch.setattr(waves, "pieces", lambda job: [replace(job, piece=name) for name in left.pop(0)])
    ray = Ray(
        init=lambda **_: seen.append("begin"),
        shutdown=lambda: seen.append("end"),
        is_initialized=lambda: "begin" in seen,
        cluster_resources=dict,
        wait=lambda refs, num_returns: (refs[:1], refs[1:]),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert len(list(waves.in_waves(clusters.on_ray, jobs("CoOp"), backends.Options(), print))) == 1
    assert seen == ["begin", "0", "1", "2", "end"]


@pytest.mark.parametrize(
    ("flags", "task", "threads"),
    [(["--threads", "2"], {"cpus": 8}, 2), ([], {"cpus": 8}, 8), ([], {}, 4)],
)
def test_slurm_is_asked_for_cpus_of_the_task_not_of_this_machine(tmp_path, flags, task, threads):
    options = options_of(tmp_path, ["--backend", "slurm", "--jobs", "9", *flags], **({"task": task} if task else {}))
    assert options.threads == threads and options.jobs == 9


def test_a_task_with_too_few_gpus_is_a_failed_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    assert "this task was given 1 GPU" in backends.perform(jobs("CoOp")[0], backends.Options(devices=2)).error


def test_interrupted_driver_cancels_what_is_queued(submitit):
    running = clusters.on_slurm(jobs("CoOp", "KgCoOp"), backends.Options(), lambda index: None)
    next(running)
    running.close()
    assert [job.cancelled for job in submitit.jobs] == [False, True]


def test_slurm_refuses_what_it_cannot_do(submitit, monkeypatch):
    with pytest.raises(UserError, match="colour"):
        next(clusters.on_slurm(jobs("CoOp"), backends.Options(slurm={"colour": 1}), print))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="sbatch"):
        next(clusters.on_slurm(jobs("CoOp"), backends.Options(), print))


def test_a_backend_that_can_not_start_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    path = made.make_sweep(tmp_path, tmp_path / "new" / "out", trainers=["ZeroshotCLIP"], datasets=["EmojiFamilies"])
    assert main(["sweep", str(path), "--backend", "slurm"]) == 2 and "submitit" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_missing_extra_is_one_line(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'promptmix\[{name}\]'"):
        next(clusters.BACKENDS[name](jobs("CoOp"), backends.Options(), print))
