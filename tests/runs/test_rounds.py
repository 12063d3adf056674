"""Protocols in rounds: what is labelled and shared, that a cut in any round changes nothing, and clients as jobs of a backend."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from promptmix.cli import main
from promptmix.engine import TrainerBase
from promptmix.errors import ConfigError
from promptmix.runs import results, waves
from promptmix.runs.backends import Options, Outcome
from promptmix.runs.federated import Plan, participants, shuffled_clients, split_pictures
from promptmix.runs.protocols import Job
from promptmix.runs.server import choose_others, weighted_average
from tests.runs import made
from tests.trainers.golden import close, numbers, seeded

ROUNDS = 3
SMALL = [word for key, value in made.SETTINGS.items() for word in (key, str(value))]
ACTIVE = ["PROTOCOL.ACTIVE.ROUNDS", str(ROUNDS), "PROTOCOL.ACTIVE.GAMMA", "0.6"]
FEDERATED = [f"PROTOCOL.FEDERATED.{word}" if word.isupper() else word for word in ("ROUNDS", "2", "CLIENTS", "2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rounds")
    made.make_sweep(path, path / "unused")
    return path


def words(folder, protocol, output, *flags, trainer="PFedMoAP", opts=()):
    data = ["--datasets", str(folder / "paints.yaml"), "--root", str(folder / "data"), "--seeds", "1"]
    config = ["--config-file", "configs/trainers/{trainer}/tiny.yaml"]
    return ["run", protocol, "--trainer", trainer, *data, *config, "--output-dir", str(output), *flags, *SMALL, *opts]


def active(folder, output, *opts, trainer="PCB"):
    return main(words(folder, "active", output, trainer=trainer, opts=[*ACTIVE, *opts]))


def federated(folder, output, *opts, trainer="PFedMoAP"):
    return main(words(folder, "federated", output, trainer=trainer, opts=[*FEDERATED, *opts]))


def tree(output):
    """Return what every part of the only job used and scored: its note without stamps, and its numbers."""
    found = {}
    for note in sorted(output.rglob("round.json")):
        inputs = {key: value for key, value in json.loads(note.read_text()).items() if key != "after"}
        result = results.load(note.parent / results.FILE_NAME)
        found[result.part] = inputs, result.metrics
    return found


def fails(capsys, run, *words):
    assert run() == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error


# active


@pytest.fixture(scope="module")
def labelled(folder):
    assert active(folder, folder / "active") == 0
    return tree(folder / "active")


def test_each_round_labels_new_pictures_and_trains_on_all_so_far(labelled, folder):
    assert list(labelled) == ["round0", "round1", "round2"]
    so_far = []
    for inputs, metrics in labelled.values():
        so_far += inputs["picked"]
        assert inputs["train"] == so_far and len(inputs["picked"]) == 4 == len(made.CLASSES)
        assert set(metrics) == {"test"}
    assert sorted(so_far) == list(range(12))  # 3 rounds of 4 are the whole pool
    log = next((folder / "active").rglob("round1/log.txt")).read_text()
    assert "# train_x  8" in log and "# classes  4" in log and "# test     16" in log


def test_a_cut_in_any_round_changes_nothing(labelled, folder, capsys):
    (job,) = (folder / "active").rglob("seed1")
    (job / "round1" / "results.json").unlink()  # killed between the last epoch and the end of the test
    shutil.rmtree(job / "round2")
    assert active(folder, folder / "active") == 0
    assert capsys.readouterr().out.count("finished before") == 1
    assert tree(folder / "active") == labelled
    assert active(folder, folder / "active") == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before") == ROUNDS and "Round 0" in shown and "Round 2" in shown
    shutil.rmtree(job / "round0")  # made again, it is the same, so what follows from it stands
    assert active(folder, folder / "active") == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert tree(folder / "active") == labelled


def test_rounds_that_follow_from_another_past_are_trained_again(labelled, folder, tmp_path, capsys):
    shutil.copytree(folder / "active", tmp_path / "active")
    (job,) = (tmp_path / "active").rglob("seed1")
    note = json.loads((job / "round2" / "round.json").read_text())
    note["train"][-1], note["after"] = note["train"][0], ["long ago"]
    (job / "round2" / "round.json").write_text(json.dumps(note))
    fails(capsys, lambda: active(folder, folder / "active", "PROTOCOL.ACTIVE.SELECTOR", "entropy"), "another run", "SELECTOR")
    for part in job.iterdir():  # as if it had always been here
        path = part / "results.json"
        path.write_text(path.read_text().replace(str(folder / "active"), str(tmp_path / "active")))
    assert active(folder, tmp_path / "active") == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert tree(tmp_path / "active") == labelled


@pytest.mark.parametrize(("selector", "balance"), [("random", True), ("random", False), ("entropy", True), ("coreset", False)])
def test_selectors_with_and_without_balance(selector, balance, folder, tmp_path):
    opts = ["PROTOCOL.ACTIVE.SELECTOR", selector, "PROTOCOL.ACTIVE.BALANCE", str(balance)]
    opts += ["PROTOCOL.ACTIVE.QUERY", "2", "PROTOCOL.ACTIVE.ROUNDS", "2"]
    assert active(folder, tmp_path, *opts, trainer="CoOp") == 0
    assert [len(set(inputs["train"])) for inputs, _ in tree(tmp_path).values()] == [2, 4]


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["PROTOCOL.ACTIVE.SELECTOR", "entropi"], ["unknown selector 'entropi'", "did you mean 'entropy'"]),
        (["PROTOCOL.ACTIVE.ROUNDS", "4"], ["PROTOCOL.ACTIVE.ROUNDS is 4", "12 pictures", "lower ROUNDS or QUERY"]),
        (["PROTOCOL.ACTIVE.GAMMA", "0"], ["PROTOCOL.ACTIVE.GAMMA", "more than 0"]),
        (["PROTOCOL.FEDERATED.CLIENTS", "3"], ["PROTOCOL.FEDERATED.CLIENTS", "active reads PROTOCOL.ACTIVE.*"]),
        (["DATASET.SUBSET", "mine.json"], ["DATASET.SUBSET", "the protocol"]),
    ],
)
def test_mistakes_in_rounds_are_one_line(opts, words, folder, tmp_path, capsys):
    fails(capsys, lambda: active(folder, tmp_path / "out", *opts), *words)
    assert not (tmp_path / "out").exists()


def test_settings_of_a_protocol_are_refused_elsewhere(folder, tmp_path, capsys):
    run = words(folder, "few-shot", tmp_path / "out", trainer="CoOp", opts=["PROTOCOL.ACTIVE.ROUNDS", "2"])
    fails(capsys, lambda: main(run), "PROTOCOL.ACTIVE.ROUNDS", "would be ignored", "few-shot reads")
    run = words(folder, "active", tmp_path / "out", trainer="ZeroshotCLIP")
    fails(capsys, lambda: main(run), "ZeroshotCLIP", "learns nothing")
    run = words(folder, "active", tmp_path / "out", "--targets", "EmojiFamilies", trainer="CoOp")
    fails(capsys, lambda: main(run), "--targets", "no targets")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", '{"train": []}', '{"train": [99]}', '{"test": [0.5]}'])
def test_a_subset_that_numbers_no_pictures_is_refused(content, folder, tmp_path, capsys):
    (tmp_path / "subset.json").write_text(content)
    flags = ["--config-file", "configs/quickstart.yaml", "--root", str(folder / "data"), "--output-dir", str(tmp_path / "out")]
    opts = [
        "DATASET.NAME",
        "ImageFolder",
        "DATASET.IMAGEFOLDER.FOLDER",
        "paints",
        "DATASET.SUBSET",
        str(tmp_path / "subset.json"),
    ]
    fails(capsys, lambda: main(["train", "--trainer", "CoOp", *flags, *SMALL, *opts]), "DATASET.SUBSET", "subset.json")
    assert not (tmp_path / "out").exists()


# federated: the server


def contexts():
    return {i: torch.from_numpy(seeded().learned("pfedmoap", f"client_{i}.ctx", (4, 512))) for i in range(6)}


def test_choices_of_the_server_are_the_authors():
    expected, every = numbers("pfedmoap"), contexts()
    plan = Plan(clients=6, fraction=0.5)
    order = shuffled_clients(plan, 1)
    assert order == expected["sel:shuffled"].tolist()
    assert participants(plan, 1, 0) == expected["sel:participants"].tolist()
    some = {i: every[i] for i in (0, 2, 5)}
    for client in range(6):
        for kind, known, name in (
            ("random", every, "random"),
            ("random", some, "random_some"),
            ("nearest", some, "nearest_some"),
        ):
            assert choose_others(client, known, order, 3, kind) == expected[f"sel:{name}/{client}"].tolist()
        assert choose_others(client, every, order, 3, "nearest") == expected[f"sel:nearest_intended/{client}"].tolist()
    chosen = expected["sel:participants"].astype(int)
    sizes = expected["sel:sizes"].astype(int)
    average = weighted_average([every[i] for i in chosen], [int(sizes[i]) for i in chosen])
    close(average.double().norm(), expected["global_prompt_norm"])
    close(average.flatten()[:256], expected["global_prompt_head"])


def items(labels, domains=1):
    return [SimpleNamespace(label=label, domain=i % domains) for i, label in enumerate(labels)]


@pytest.mark.parametrize("split", ["classes", "dirichlet", "domains"])
def test_every_picture_belongs_to_one_client(split):
    train, test = items(np.repeat(range(10), 40), 3), items(np.repeat(range(10), 20), 3)
    found = split_pictures(Plan(clients=3, split=split), train, test, 10)
    for part, whole in ((0, train), (1, test)):
        assert sorted(place for client in found for place in client[part]) == list(range(len(whole)))
    if split == "classes":
        seen = [{train[place].label for place in client[0]} for client in found]
        assert [len(labels) for labels in seen] == [3, 3, 4]
        assert seen == [{test[place].label for place in client[1]} for client in found]
    assert found == split_pictures(Plan(clients=3, split=split), train, test, 10)


@pytest.mark.parametrize(
    ("split", "words"), [("classes", "without training or test"), ("domains", "of 1 domains"), ("dirichlet", "BETA")]
)
def test_clients_without_pictures_are_refused(split, words):
    train = items([0, 1, 2])
    with pytest.raises(ConfigError, match=words) as refusal:
        split_pictures(Plan(clients=7, split=split), train, train, 3)
    assert "\n" not in str(refusal.value)


# federated: the run


@pytest.fixture(scope="module")
def shared(folder):
    assert federated(folder, folder / "federated") == 0
    return tree(folder / "federated")


def learned(output, part):
    return torch.load(next(output.rglob(f"{part}/prompt_learner/model.pth.tar-2")), weights_only=True)["state_dict"]


def test_clients_share_the_average_and_borrow_prompts(shared, folder, capsys):
    assert list(shared) == ["round0/client0", "round0/client1", "round1/client0", "round1/client1"]
    first = [shared[f"round0/client{i}"][0] for i in (0, 1)]
    assert sorted(first[0]["train"] + first[1]["train"]) == list(range(12)) and first[0]["start"] == first[1]["start"]
    output = folder / "federated"
    own = [learned(output, f"round0/client{i}") for i in (0, 1)]
    assert all(len(state["bank.others"]) == 0 for state in own)
    assert torch.equal(own[0]["head.w_q.weight"], own[1]["head.w_q.weight"])  # the gate waits for others
    later = [learned(output, f"round1/client{i}") for i in (0, 1)]
    for mine, other in ((0, 1), (1, 0)):
        assert torch.equal(later[mine]["bank.others"], own[other]["bank.ctx"])
        assert not torch.equal(later[mine]["head.w_q.weight"], own[mine]["head.w_q.weight"])
    capsys.readouterr()
    assert main(["parse", str(output)]) == 0
    shown = capsys.readouterr().out
    last = np.mean([shared[f"round{r}/client{i}"][1]["test"]["accuracy"] for r in (0, 1) for i in (0, 1)])
    assert "Last rounds" in shown and f"{last:.2f}" in shown


def test_a_cut_in_any_round_of_clients_changes_nothing(shared, folder, capsys):
    (job,) = (folder / "federated").rglob("seed1")
    (job / "round0" / "client1" / "results.json").unlink()
    shutil.rmtree(job / "round1" / "client0")
    assert federated(folder, folder / "federated") == 0
    assert tree(folder / "federated") == shared
    capsys.readouterr()
    assert federated(folder, folder / "federated") == 0
    assert capsys.readouterr().out.count("finished before") == 4


def test_clients_are_jobs_of_a_backend_with_the_same_numbers(shared, folder):
    assert importlib.util.find_spec("ray"), "ray is in the extra `test`: pip install -e '.[test]'"
    settings = made.SETTINGS | {"PROTOCOL.FEDERATED": {"ROUNDS": 2, "CLIENTS": 2}}
    more = {"protocols": ["federated", "few-shot"], "trainers": ["PFedMoAP"], "datasets": ["paints.yaml"], "seeds": [1]}
    few = []
    for backend in ("local", "ray"):
        path = made.make_sweep(
            folder, folder / backend, **more, shots=[16], config="configs/trainers/{trainer}/tiny.yaml", set=settings
        )
        done = made.sweep(path, "--jobs", "2", "--backend", backend)
        assert done.returncode == 0, done.stderr
        assert "2 of 2 to run" in done.stdout and "mean of the last round" in done.stdout
        assert tree(folder / backend / "federated") == shared
        few.append(made.numbers(folder / backend / "few-shot"))
        again = made.sweep(path, "--backend", backend, "--dry-run")
        assert again.stdout.count("done ") == 2
    assert few[0] == few[1] and len(few[0]) == 1


def test_a_client_cut_off_in_its_training_goes_on_bit_for_bit(shared, folder, tmp_path, monkeypatch):
    save = TrainerBase.save_progress

    def cut(trainer):
        save(trainer)
        if "round1/client1" in trainer.output_dir and trainer.epoch == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainerBase, "save_progress", cut)
    assert federated(folder, tmp_path / "cut") == 130
    monkeypatch.undo()
    assert next((tmp_path / "cut").rglob("round1/client1/progress.pth"))
    assert federated(folder, tmp_path / "cut") == 0
    assert tree(tmp_path / "cut") == shared
    for part in shared:
        ours, theirs = learned(tmp_path / "cut", part), learned(folder / "federated", part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_waves_spread_pieces_and_end_what_cannot_go_on(monkeypatch):
    left = {"a": [["0"], ["1", "2"], []], "b": [["0"], []], "c": [["0"], ["0"]]}

    def pieces(job):
        return [replace(job, piece=name) for name in left[job.trainer].pop(0)]

    def backend(jobs, options, started):
        seen.append([(job.trainer, job.piece) for job in jobs])
        for place, job in enumerate(jobs):
            started(place)
            failed = "no memory" if (job.trainer, job.piece) == ("b", "0") else ""
            yield place, Outcome(failed, {} if failed else {"part": float(job.piece)}, 1.0)

    monkeypatch.setattr(waves, "pieces", pieces)
    seen = []
    jobs = [Job("federated", name, "", name, 1) for name in left]
    found = dict(waves.in_waves(backend, jobs, Options(), lambda index: None))
    assert seen == [[("a", "0"), ("b", "0"), ("c", "0")], [("a", "1"), ("a", "2")]]
    assert found[0] == Outcome(numbers={"mean of the last round": 1.5}, seconds=3.0)
    assert found[1].error == "0: no memory" and "does not count" in found[2].error


def test_a_client_that_fails_is_told_and_the_others_stand(folder, tmp_path):
    settings = made.SETTINGS | {"PROTOCOL.FEDERATED": {"ROUNDS": 2, "CLIENTS": 7}}
    more = {"protocols": ["federated"], "trainers": ["CoOp"], "datasets": ["paints.yaml"], "seeds": [1], "set": settings}
    done = made.sweep(made.make_sweep(folder, tmp_path / "bad", **more), "--jobs", "2")
    assert done.returncode == 1
    assert "PROTOCOL.FEDERATED.CLIENTS is 7" in done.stderr


@pytest.mark.parametrize(("key", "value"), [("CLIENTS", "0"), ("FRACTION", "1.5"), ("FRACTION", "nan"), ("ROUNDS", "99999")])
def test_numbers_out_of_range_are_refused_before_clients_are_drawn(key, value, folder, tmp_path, capsys):
    run = words(folder, "federated", tmp_path / "out", trainer="CoOp", opts=[f"PROTOCOL.FEDERATED.{key}", value])
    fails(capsys, lambda: main(run), f"PROTOCOL.FEDERATED.{key} is {value}", "give ")
    assert not (tmp_path / "out").exists()


def test_any_method_with_a_learner_can_be_averaged(folder, tmp_path, capsys):
    assert federated(folder, tmp_path / "coop", "PROTOCOL.FEDERATED.FRACTION", "0.5", trainer="CoOp") == 0
    assert list(tree(tmp_path / "coop")) == sorted(tree(tmp_path / "coop"))
    run = words(folder, "federated", tmp_path / "zero", trainer="ZeroshotCLIP", opts=FEDERATED)
    fails(capsys, lambda: main(run), "ZeroshotCLIP", "learns nothing")
    assert not (tmp_path / "zero").exists()


def test_hook_register_selectors(folder, tmp_path):
    plugin = tmp_path / "last.py"
    plugin.write_text(
        "from promptmix import hookimpl\nfrom promptmix.runs.selection import Selector\n"
        "class Last(Selector):\n    def select(self, pool, count, draws):\n        return pool.unlabelled[-count:]\n"
        "@hookimpl\ndef register_selectors(registry): registry.register(Last, name='last')\n"
    )
    opts = ["PROTOCOL.ACTIVE.SELECTOR", "last", "PROTOCOL.ACTIVE.BALANCE", "False", "PROTOCOL.ACTIVE.ROUNDS", "2"]
    run = words(folder, "active", tmp_path / "out", "--plugin", str(plugin), trainer="CoOp", opts=opts)
    assert main(run) == 0
    found = tree(tmp_path / "out")
    first = found["round0"][0]["picked"]
    assert found["round1"][0]["picked"] == [place for place in range(12) if place not in first][-4:]
