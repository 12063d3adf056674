"""Checkouts of every shape that public forks of CoOp have, made small: each runs, or says in one line what stops it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from promptmix.cli import main
from promptmix.dassl.checkout import _own_tests_reported
from promptmix.dassl.config import get_cfg_default
from promptmix.dassl.nogpu import without_cuda
from promptmix.registry import EVALUATOR_REGISTRY
from tests.dassl.fork import change, command, log, make, refused, run


@pytest.fixture
def room(tmp_path):
    return make(tmp_path)


def test_globals_of_the_main_block_are_there(room):
    """TaskRes, BlackVIP and CoDoL read `args` in setup_cfg and trainers, which only the block at the end sets."""
    change(room, "train.py", ("    main(parser.parse_args())", "    args = parser.parse_args()\n    main(args)"))
    change(room, "train.py", ("    cfg.TRAINER.WORDBIAS.NOTE = args.note", "    cfg.TRAINER.WORDBIAS.NOTE = outer()"))
    change(room, "train.py", ("def extend_cfg(cfg):", "def outer():\n    return args.note\n\n\ndef extend_cfg(cfg):"))
    assert run(room)["config"]["TRAINER"]["WORDBIAS"]["NOTE"] == "from the fork's own flag"


def test_a_forks_own_flags_are_taken(room):
    change(
        room,
        "train.py",
        (
            '    parser.add_argument("opts"',
            '    parser.add_argument("--twice", action="store_true")\n    parser.add_argument("opts"',
        ),
    )
    change(room, "train.py", ("NOTE = args.note", "NOTE = args.note * (2 if args.twice else 1)"))
    assert run(room, "--note", "ab", "--twice")["config"]["TRAINER"]["WORDBIAS"]["NOTE"] == "abab"


def test_flags_that_a_fork_writes_otherwise(room):
    change(room, "train.py", ("--output-dir", "--output_dir"), ("--dataset-config-file", "--dataset_config_file"))
    assert run(room)["config"]["DATASET"]["NAME"] == "OxfordPets"


def test_what_a_program_sets_for_all_its_trainers_may_go_unread(room):
    change(room, "train.py", ("NOTE = args.note", "NOTE = args.note; cfg.OPTIM.NEW_LAYERS = ['film']"))
    assert run(room, "--note", "ab")["config"]["OPTIM"]["NEW_LAYERS"] == ["film"]


def test_values_are_the_authors_dassls(room):
    """DAPT leaves out a second training of no epoch, UPL's files choose the model ``last_val``: Dassl only looks for best_val."""
    copied = "import copy; cfg.OPTIM_SELECTION = copy.deepcopy(cfg.OPTIM); cfg.OPTIM_SELECTION.MAX_EPOCH = 0"
    change(room, "train.py", ("NOTE = args.note", f"NOTE = args.note; {copied}; cfg.TEST.FINAL_MODEL = 'last_val'"))
    config = run(room, "--note", "ab")["config"]
    assert config["OPTIM_SELECTION"]["MAX_EPOCH"] == 0 and config["TEST"]["FINAL_MODEL"] == "last_val"


def test_a_tensor_that_was_moved_may_be_written_into(tmp_path):
    """ViP adds to ``torch.zeros(2, requires_grad=True).cuda()``, which is no leaf any more; a parameter stays itself."""
    parameter = torch.nn.Parameter(torch.ones(2))
    with without_cuda(tmp_path):
        for move in (torch.Tensor.cuda, torch.Tensor.half, lambda tensor: tensor.to("cuda")):
            moved = move(torch.zeros(2, requires_grad=True))
            moved += parameter
            assert moved.requires_grad and move(parameter) is parameter


def test_flags_of_ours_stay_with_us(room):
    assert run(room, "--threads", "1")["config"]["TRAINER"]["NAME"] == "WordBias"


def test_a_flag_that_nobody_knows(room, capsys):
    error = refused(room, capsys, "--noet", "ab")
    assert "train.py refuses its command line: unrecognized arguments: --noet; it takes --backbone," in error


def test_main_that_differs_is_run(room):
    """PromptAlign, Nemesis and BlackVIP do in main what CoOp does not."""
    body = 'trainer = build_trainer(cfg)\n    trainer.train()\n    trainer.customized()\n    print("main is over")'
    change(room, "train.py", ("build_trainer(cfg).train()", body))
    change(
        room,
        "trainers/wordbias.py",
        ("    def parse_batch_train", '    def customized(self):\n        print("customized test")\n\n    def parse_batch_train'),
    )
    run(room)
    assert re.search(r"customized test\nmain is over\nResults: ", log(room))


def test_a_test_of_another_name_reports_its_numbers(room):
    """Ensemble_VLM's main calls test_search; nothing of Dassl's is called test then."""
    body = """    def search(self):
        for batch in self.test_loader:
            self.evaluator.process(self.model_inference(batch["img"]), batch["label"])
        self.evaluator.evaluate()

"""
    change(room, "trainers/wordbias.py", ("    def parse_batch_train", f"{body}    def parse_batch_train"))
    change(room, "train.py", ("build_trainer(cfg).train()", "build_trainer(cfg).search()"))
    assert run(room)["metrics"]["test"]["accuracy"] > 0


def test_an_evaluator_that_no_registry_of_dassls_has():
    """M3PL builds it by a registry of its own."""
    cfg = get_cfg_default()
    cfg.TEST.EVALUATOR = "MultiClassification"
    before = dict(EVALUATOR_REGISTRY.snapshot())
    with _own_tests_reported(cfg):
        assert before == EVALUATOR_REGISTRY.snapshot()


def test_what_main_prints_first_is_in_the_log(room):
    change(room, "train.py", ("    set_random_seed(cfg.SEED)", '    print("before the trainer")\n    set_random_seed(cfg.SEED)'))
    run(room)
    assert log(room).count("before the trainer") == 1


def test_a_second_trainer_in_main(room):
    """BlackVIP trains, then tests in a trainer that it builds anew."""
    again = [
        "build_trainer(cfg).train()",
        "again = build_trainer(cfg)",
        "again.load_model(cfg.OUTPUT_DIR, epoch=1)",
        "again.test()",
    ]
    change(room, "train.py", ("build_trainer(cfg).train()", "\n    ".join(again)))
    assert run(room)["metrics"]["test"]["accuracy"] > 0
    assert log(room).count("=> result") == 2


def test_other_signature_of_setup_cfg(room):
    """SpecPL."""
    change(
        room,
        "train.py",
        ("def setup_cfg(args):", "def setup_cfg(args, depth):"),
        ("setup_cfg(args)\n    set", "setup_cfg(args, depth=3)\n    set"),
    )
    run(room)


def test_only_setup_cfg(room):
    text = (room / "fork" / "train.py").read_text()
    (room / "fork" / "train.py").write_text(text.partition("\ndef main(")[0] + "\n")
    change(room, "train.py", ("    cfg.TRAINER.WORDBIAS.NOTE = args.note\n", ""))
    assert run(room)["metrics"]["test"]["accuracy"] > 0


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "exit()"])
def test_a_program_that_leaves_by_itself(room, end):
    """ATPrompt ends a training run with os._exit, after which nothing would be written."""
    change(
        room,
        "train.py",
        ("build_trainer(cfg).train()", f"build_trainer(cfg).train()\n    {end}"),
        ("import argparse\n", "import argparse\nimport os  # noqa: F401\nimport sys  # noqa: F401\n"),
    )
    assert run(room)["metrics"]["test"]["accuracy"] > 0


def test_a_program_that_gives_up(room, capsys):
    change(room, "train.py", ("    set_random_seed", '    raise SystemExit("no such seed")\n    set_random_seed'))
    assert re.search(r"error: train.py:\d+ stops the program \(no such seed\)", refused(room, capsys))


def test_a_bare_except_hides_nothing(room, capsys):
    """DePT's main catches everything and raises an Exception without the reason."""
    change(
        room,
        "train.py",
        (
            "build_trainer(cfg).train()",
            'try:\n        build_trainer(cfg).train()\n    except:  # noqa: E722\n        raise Exception("not successful")',
        ),
    )
    change(
        room,
        "trainers/wordbias.py",
        ("    def parse_batch_train(self, batch):\n", "    def parse_batch_train(self, batch):\n        {}['nothing']\n"),
    )
    assert re.search(r"error: trainers/wordbias.py:\d+ fails: KeyError: 'nothing' \(--debug", refused(room, capsys))


def test_a_config_that_was_never_frozen(room):
    """Ensemble_VLM's trainers change the backbone's name as they build one model after the other."""
    change(room, "train.py", ("    cfg.freeze()\n", ""))
    build = "    def build_model(self):\n"
    change(room, "trainers/wordbias.py", (build, f"{build}        self.cfg.TRAINER.WORDBIAS.NOTE = 'mine'\n"))
    run(room)


# Paths


def test_a_trainer_that_writes_into_its_output_folder_while_it_is_built(room, capsys):
    """Candle keeps numbers of classes there; in Dassl the folder is made with the log, before any trainer."""
    build = "    def build_model(self):\n"
    change(room, "trainers/wordbias.py", (build, f"{build}        open(self.cfg.OUTPUT_DIR + '/cache.txt', 'w').close()\n"))
    refused(room, capsys, trainer="WordBais")
    assert not (room / "out").exists()
    run(room)
    assert (room / "out" / "cache.txt").exists()


def test_its_own_configs_win_from_any_folder(room, monkeypatch):
    """From promptmix's own checkout, which has configs of the same names."""
    other = room / "here" / "configs" / "trainers" / "WordBias"
    other.mkdir(parents=True)
    (other / "ep3.yaml").write_text("OPTIM:\n  LR: 123.0\n")
    monkeypatch.chdir(room / "here")
    assert run(room)["config"]["OPTIM"]["LR"] == 0.05
    assert Path.cwd() == room / "here"


def test_a_package_without_files_of_its_own(room, monkeypatch):
    """UPL keeps defaults in configs/upl_default_config/, and promptmix's own checkout has a package configs."""
    (room / "here" / "configs").mkdir(parents=True)
    (room / "here" / "configs" / "__init__.py").write_text("raise ImportError('not this one')\n")
    monkeypatch.syspath_prepend(str(room / "here"))
    (room / "fork" / "configs" / "more").mkdir()
    (room / "fork" / "configs" / "more" / "words.py").write_text("NOTE = 'from a package'\n")
    change(
        room,
        "train.py",
        ("NOTE = args.note", "NOTE = words.NOTE"),
        ("import argparse\n", "import argparse\nfrom configs.more import words\n"),
    )
    assert run(room)["config"]["TRAINER"]["WORDBIAS"]["NOTE"] == "from a package"


def test_files_of_the_checkout_and_files_here(room, monkeypatch):
    """Forks open ./gpt_file/...; what the user names is relative to where the user is."""
    (room / "fork" / "words").mkdir()
    (room / "fork" / "words" / "one.json").write_text('"from the checkout"')
    change(
        room,
        "train.py",
        ("NOTE = args.note", 'NOTE = json.load(open("words/one.json"))'),
        ("import argparse\n", "import argparse\nimport json\n"),
    )
    monkeypatch.chdir(room)
    words = command(room)
    for flag, path in (
        ("--coop-repo", "fork"),
        ("--root", "."),
        ("--output-dir", "./out"),
        ("MODEL.BACKBONE.WEIGHTS", "weights/tiny.pt"),
    ):
        words[words.index(flag) + 1] = path
    assert main(words) == 0
    results = json.loads((room / "out" / "results.json").read_text())
    assert results["config"]["TRAINER"]["WORDBIAS"]["NOTE"] == "from the checkout"
    assert results["config"]["OUTPUT_DIR"] == str(room / "out")


# CLIP


def test_weights_reach_every_copy_of_clip(room):
    """TCP and BIP have a second copy in clip_text, LoCoOp in clip_w_local."""
    shutil.copytree(room / "fork" / "clip", room / "fork" / "clip_text")
    change(
        room,
        "trainers/wordbias.py",
        ("from clip import clip\n", "from clip import clip\nfrom clip_text import clip as clip_text\n"),
    )
    change(
        room,
        "trainers/wordbias.py",
        ("        clip_model = clip.load(", "        clip_text.load(cfg.MODEL.BACKBONE.NAME)\n        clip_model = clip.load("),
    )
    run(room)


def test_weights_of_a_path_inside_the_checkout(room):
    """PromptKD opens ./clip/ViT-B-16.pt itself."""
    change(
        room,
        "clip/clip.py",
        ("torch.load(_download(_MODELS[name]), map_location", 'torch.load("./clip/" + name + ".pt", map_location'),
    )
    run(room)


def test_a_folder_of_weights_serves_two_models(room):
    """A distillation loads a teacher beside its student."""
    change(room, "clip/clip.py", ('_MODELS = {"Tiny"', '_MODELS = {"Large": "https://example.invalid/large.pt", "Tiny"'))
    change(
        room,
        "trainers/wordbias.py",
        (
            "        clip_model = clip.load(",
            '        assert not clip.load("Large").visual.weight.any()\n        clip_model = clip.load(',
        ),
    )
    run(room, weights="weights")
    shutil.rmtree(room / "out")


def test_another_model_is_not_given_the_weights(room, capsys):
    change(room, "clip/clip.py", ('_MODELS = {"Tiny"', '_MODELS = {"Large": "https://example.invalid/large.pt", "Tiny"'))
    change(
        room,
        "trainers/wordbias.py",
        ("        clip_model = clip.load(", '        clip.load("Large")\n        clip_model = clip.load('),
    )
    assert "clip/clip.py:10 fails: RuntimeError: the tests are offline" in refused(room, capsys)


def test_a_tree_without_our_keys(room):
    """UPL has defaults of its own."""
    lines = "cfg = get_cfg_default()\n    del cfg.MODEL.BACKBONE['WEIGHTS'], cfg['DEVICE'], cfg.DATASET['SKIP_BAD']\n"
    change(room, "train.py", ("cfg = get_cfg_default()\n", lines))
    assert run(room)["config"]["MODEL"]["BACKBONE"]["WEIGHTS"].endswith("tiny.pt")


def test_weights_that_nothing_asks_for(room, capsys):
    change(
        room,
        "clip/clip.py",
        (
            'Tiny(torch.load(_download(_MODELS[name]), map_location="cpu"))',
            'Tiny({"visual.weight": torch.ones(4, 3), "words.weight": torch.ones(128, 4)})',
        ),
    )
    assert re.search(
        r"MODEL.BACKBONE.WEIGHTS .*tiny.pt would be ignored: nothing in .*fork asked for the weights of Tiny",
        refused(room, capsys),
    )
    assert not (room / "out").exists()


def test_pkg_resources_packaging(room):
    change(room, "clip/clip.py", ("import torch\n", "import torch\nfrom pkg_resources import packaging\n"))
    change(
        room,
        "clip/clip.py",
        (
            "\n\ndef _download",
            '\n\nassert packaging.version.parse(torch.__version__) >= packaging.version.parse("1.7.1")\n\n\ndef _download',
        ),
    )
    before = set(sys.modules)
    run(room)
    assert "pkg_resources" not in set(sys.modules) - before


# Programs, and what stays


def test_device_is_a_device(room):
    """`auto` is ours; forks make a torch.device of what they find."""
    change(
        room,
        "trainers/wordbias.py",
        ("        cfg = self.cfg\n        print", "        torch.device(self.cfg.DEVICE)\n        cfg = self.cfg\n        print"),
    )
    assert run(room, "--device", "cpu")["config"]["DEVICE"] == "cpu"


@pytest.mark.parametrize("file", ["main.py", "tools/train.py"])
def test_a_program_of_another_name(room, file):
    """BAPLe's is main.py; MAP's lies in tools and is called from the folder above."""
    (room / "fork" / file).parent.mkdir(exist_ok=True)
    (room / "fork" / "train.py").rename(room / "fork" / file)
    words = command(room)
    words[2] = str(room / "fork" / file)
    assert main(words) == 0


def test_a_program_of_another_name_is_suggested(room, capsys):
    (room / "fork" / "train.py").rename(room / "fork" / "main.py")
    assert re.search(r"fork: no train.py there; did you mean .*fork/main.py\?", refused(room, capsys))


def test_a_slash_at_the_end_of_a_path_stays(room):
    """DAPT writes root + "eurosat"."""
    change(room, "train.py", ("NOTE = args.note", "NOTE = args.root"))
    words = command(room)
    words[words.index("--root") + 1] = str(room) + "/"
    assert main(words) == 0
    assert json.loads((room / "out" / "results.json").read_text())["config"]["TRAINER"]["WORDBIAS"]["NOTE"] == f"{room}/"


def test_nothing_of_a_run_stays(room):
    before = (
        os.getcwd(),
        list(sys.argv),
        list(sys.path),
        list(sys.meta_path),
        os._exit,
        torch.load,
        torch.optim.lr_scheduler.LRScheduler.__init__,
    )
    run(room)
    assert before == (
        os.getcwd(),
        list(sys.argv),
        list(sys.path),
        list(sys.meta_path),
        os._exit,
        torch.load,
        torch.optim.lr_scheduler.LRScheduler.__init__,
    )
