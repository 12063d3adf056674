"""The search of a sweep: as many trials for each method, chosen on val alone, and an ordinary sweep file of what won."""

import json

import pytest
import yaml

from promptmix.cli import main
from promptmix.errors import ConfigError, OutputError, UserError
from promptmix.registry import SWEEP_BACKEND_REGISTRY
from promptmix.runs import backends, search, sweep
from promptmix.runs.results import RunResult
from tests.runs import made

TRIALS = {"low": {"OPTIM.LR": "x0.5"}, "written": {}, "high": {"OPTIM": {"LR": "x3", "MAX_EPOCH": "x2"}}}


def make(folder, **more):
    tree = {
        "output": str(folder / "out"),
        "protocols": ["base-to-new"],
        "trainers": ["CoOp", {"name": "KgCoOp", "label": "far", "set": {"TRAINER.KGCOOP.W": 1.0}}],
        "datasets": ["EmojiFamilies"],
        "seeds": [1, 2],
        "shots": [1],
        "search": {"seeds": [11, 12], "trials": TRIALS},
    } | more
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def pretend(job, **val):
    """Leave what a finished training leaves."""
    run = RunResult(job.trainer, "EmojiFamilies", metrics={"val": val, "test": {"accuracy": 100 - val["accuracy"]}})
    folder = sweep.Path(job.folder, "base")
    folder.mkdir(parents=True)
    run.save(folder)


def test_trials_are_runs_on_val_with_seeds_of_their_own(tmp_path):
    found = search.read(str(make(tmp_path)))
    assert [[trial.name for trial in trials] for trials in found.methods] == [["low", "written", "high"]] * 2
    assert {job.seed for job in found.jobs} == {11, 12} and len(found.jobs) == 2 * 3 * 2
    assert len({job.folder for job in found.jobs}) == len(found.jobs)
    assert all(job.folder.startswith(f"{tmp_path}/out-search/") for job in found.jobs)
    settings = [dict(zip(job.settings[::2], job.settings[1::2], strict=True)) for job in found.jobs]
    assert all(own["TEST.SPLIT"] == "val" for own in settings)
    assert [own.get("OPTIM.LR") for own in settings[::2]] == [0.01, None, 0.06] * 2  # 0.02 in the shipped config
    assert [own.get("OPTIM.MAX_EPOCH") for own in settings[::2]] == [None, None, 60] * 2
    assert all(own["TRAINER.KGCOOP.W"] == 1.0 for own in settings[6:])


def test_best_on_val_is_written_as_a_sweep_and_test_is_not_looked_at(tmp_path):
    path = make(tmp_path)
    found = search.read(str(path))
    reached = {"CoOp": [(50, 60), (70, 52), (40, 20)], "KgCoOp": [(10, 20), (20, 10), (0, 0)]}
    for trials in found.methods:
        for trial, numbers in zip(trials, reached[trials[0].method["name"]], strict=True):
            for job, number in zip(trial.jobs, numbers, strict=True):
                pretend(job, accuracy=float(number), macro_accuracy=100.0 - number)
    numbers = search.scores(found)
    assert numbers == [[55.0, 61.0, 30.0], [15.0, 15.0, 0.0]]
    written = search.write(found, numbers)
    assert written == tmp_path / "grid-chosen.yaml" and "written of low 55.0, written 61.0, high 30.0" in written.read_text()
    tree = yaml.safe_load(written.read_text())
    assert "search" not in tree and tree["seeds"] == [1, 2]
    assert tree["trainers"] == [
        {"name": "CoOp"},
        {"name": "KgCoOp", "label": "far", "set": {"TRAINER.KGCOOP.W": 1.0, "OPTIM.LR": 0.01}},
    ]
    jobs = sweep.read(str(written)).jobs
    assert len(jobs) == 2 * 2 and jobs[2].settings == ("TRAINER.KGCOOP.W", 1.0, "OPTIM.LR", 0.01)
    assert search.write(found, numbers) == written  # its own file may be written again
    rows = json.loads(search.render(found, numbers, "json"))
    assert [row["Trial"] for row in rows if row["Chosen"]] == ["written", "low"]
    assert search.render(found, numbers, "csv").splitlines()[1] == "CoOp,,low,55.0,False"
    assert "| CoOp" in search.render(found, numbers, "github")
    balanced = search.read(str(make(tmp_path, search={"seeds": [11, 12], "trials": TRIALS, "metric": "macro_accuracy"})))
    assert search.scores(balanced)[0] == [45.0, 39.0, 70.0]
    written.write_text("output: mine\n")
    with pytest.raises(OutputError, match=r"grid-chosen.yaml is there and no search wrote it"):
        search.write(found, numbers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"search": {"seeds": [1], "trials": TRIALS}}, "seeds 1 are also those of the sweep"),
        ({"search": {"trials": TRIALS}}, "search: seeds is missing"),
        ({"search": {"seeds": [11], "trials": {}}}, "trials is empty"),
        ({"search": {"seeds": [11], "trials": TRIALS, "metrik": "x"}}, "unknown key 'metrik'"),
        ({"search": {"seeds": [11], "trials": TRIALS, "metric": "loss"}}, "must be one of: accuracy, macro_accuracy"),
        ({"trainers": [{"name": "CoOp", "trials": {"one": {}}}]}, "CoOp has 1 trials, the others 3"),
        ({"trainers": ["CoOp", {"name": "CoOp", "set": {"OPTIM.LR": 1.0}}]}, "give one of the trainers a `label`"),
        ({"variants": {"a": {}}}, "there are `variants` too"),
        ({"search": {"seeds": [11], "trials": {"a": {"OPTIM.NAME": "x3"}}}}, "OPTIM.NAME is x3, which multiplies a number"),
        ({"search": {"seeds": [11], "trials": {"a": {"OPTIM.LRR": "x3"}}}}, "unknown key 'OPTIM.LRR'"),
        ({"search": {"seeds": [11], "trials": {"a": 3}}}, "must be a mapping"),
        ({"search": {"seeds": [11], "trials": {3: {}}}}, "names must be text"),
    ],
)
def test_mistakes_in_a_search_are_named(tmp_path, change, words):
    with pytest.raises(ConfigError, match=r".+") as error:
        search.read(str(make(tmp_path, **change)))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_sweep_with_a_search_is_not_run_untuned(tmp_path):
    path = make(tmp_path)
    with pytest.raises(ConfigError, match=r"grid.yaml has a `search`: run it with --search"):
        sweep.read(str(path))
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if key != "search"}, sort_keys=False))
    with pytest.raises(ConfigError, match=r"grid.yaml has no `search`"):
        search.read(str(path))
    path.write_text(
        yaml.safe_dump({key: v for key, v in tree.items() if key != "search"} | {"trainers": [{"name": "CoOp", "trials": {}}]})
    )
    with pytest.raises(ConfigError, match=r"trials of CoOp would be ignored"):
        sweep.read(str(path))


def test_a_run_without_val_is_named(tmp_path):
    found = search.read(str(make(tmp_path)))
    with pytest.raises(UserError, match=r"results.json"):
        search.scores(found)
    for job in found.jobs:
        RunResult(job.trainer, "x").save(_made(sweep.Path(job.folder, "base")))
    with pytest.raises(UserError, match=r"has no accuracy on val; search on a data set with a val part"):
        search.scores(found)


def _made(folder):
    folder.mkdir(parents=True)
    return folder


def test_command_searches_then_the_sweep_reports(tmp_path, capsys):
    def here(jobs, options, started):
        for index, job in enumerate(jobs):
            started(index)
            yield index, backends.work(job, 1)

    zero = {"name": "ZeroshotCLIP", "trials": {"first": {}, "seven": {"TRAINER.ZEROSHOTCLIP.TEMPLATES": "imagenet7"}}}
    node = {"seeds": [11], "trials": {"first": {}, "second": {}}}
    path = make(tmp_path, trainers=[zero], seeds=[1], search=node, set={"INPUT.SIZE": [32, 32]})
    with SWEEP_BACKEND_REGISTRY.layer():
        SWEEP_BACKEND_REGISTRY.register(here, name="here")
        assert main(["sweep", str(path), "--search", "--backend", "here"]) == 0
        shown = capsys.readouterr()
        assert "accuracy on val" in shown.out and "grid-chosen.yaml" in shown.err
        assert "nan" not in (tmp_path / "out-search" / "sweep.log").read_text()
        assert main(["sweep", str(tmp_path / "grid-chosen.yaml"), "--backend", "here"]) == 0
        assert "| ZeroshotCLIP" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((made.ROOT / "configs" / "sweeps").glob("*-chosen.yaml")), ids=lambda path: path.stem)
def test_shipped_choices_are_trials_of_their_search(path):
    asked = yaml.safe_load(path.with_name(path.name.replace("-chosen", "")).read_text())
    chosen = yaml.safe_load(path.read_text())
    assert {key: value for key, value in asked.items() if key not in ("search", "trainers")} == {
        key: value for key, value in chosen.items() if key != "trainers"
    }
    entries = {
        (entry["name"], entry.get("label")): entry for entry in (sweep.method_entry(e, path.name) for e in asked["trainers"])
    }
    for won in chosen["trainers"]:  # not every method of a search must have been run
        entry = entries[won["name"], won.get("label")]
        own = sweep.flat(entry.get("set", {}), path.name)
        trials = entry.get("trials", asked["search"]["trials"])
        added = {key: value for key, value in won.get("set", {}).items() if key not in own}
        assert own.items() <= won.get("set", {}).items()
        assert any(set(added) == set(sweep.flat(trial, path.name)) for trial in trials.values())
