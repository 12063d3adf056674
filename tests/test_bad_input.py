"""Input that nobody should give, over several commands: one line, a known exit code, nothing left behind."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import promptmix
from promptmix import console
from promptmix.cli import main
from promptmix.config import get_cfg, merge_file, merge_opts
from promptmix.config.yamlfile import read_yaml
from promptmix.data.datasets.tables import picture_paths
from promptmix.data.reading.images import read_image
from promptmix.data.reading.pictures import quick_problem
from promptmix.errors import ConfigError, DataError, OutputError
from promptmix.files.whole import whole

ROOT = Path(__file__).resolve().parent.parent


def fails(capsys, command, *words, code=2):
    assert main([str(word) for word in command]) == code
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert line.startswith("promptmix: error: ")
    assert all(word in line for word in words), line


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def train(pictures, tmp_path):
    """Return a command that trains in a second, without its ``KEY VALUE`` pairs."""
    (tmp_path / "run.yaml").write_text(
        "DATASET: {NAME: ImageFolder}\nOPTIM: {MAX_EPOCH: 1}\n"
        "INPUT: {SIZE: '(64, 64)', TRANSFORMS: [normalize], PIXEL_MEAN: [0.5, 0.5, 0.5], PIXEL_STD: [0.5, 0.5, 0.5]}\n"
        "DATALOADER: {NUM_WORKERS: 0}\nMODEL: {BACKBONE: {NAME: tiny-vit}}\nDEVICE: cpu\n"
    )
    places = ["--config-file", tmp_path / "run.yaml", "--root", pictures, "--output-dir", tmp_path / "out"]
    return [str(word) for word in ["train", "--trainer", "CoOp", *places]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["INPUT.SIZE", "(32, 32)"], ["INPUT.SIZE is (32, 32)", "(64, 64) only"]),
        (["OPTIM.LR", "0.1", "--seed", "1"], ["flags come before", "--seed 1"]),
        (["--load-epoch", "2"], ["--load-epoch is for --eval-only"]),
        (["--model-dir", "x"], ["--model-dir is for --eval-only"]),
        (["--head", "mlp"], ["MODEL.HEAD.NAME is 'mlp' (set by --head)"]),
        (["TRAINER.PROMPTSRC.PREC", "fp16"], ["TRAINER.PREC (fp32, amp or bf16)"]),
        (["OPTIM.LR", "1e30", "OPTIM.NAME", "sgd", "OPTIM.MAX_EPOCH", "3"], ["infinite or NaN", "lower OPTIM.LR"]),
        (["OPTIM.NEW_LAYERS", "('bank',)"], ["STAGED_LR"]),
        (["OPTIM.LR", "1e38"], ["OPTIM.LR is 1e+38", "1e+30 or less"]),
        (["OPTIM.MOMENTUM", "2"], ["OPTIM.MOMENTUM is 2.0", "1 or less"]),
        (["--threads", "9" * 12], ["--threads is 999999999999", "from 1 to 4096"]),
        (["--plugin", "a\0b"], ["NUL character", "leave it out"]),
        (["INPUT.SIZE", "(64.5, 64.5)"], ["each item must be an int"]),
        (["DATASET.ROOT", "~nobody-of-this-name/x"], ["no folder"]),
        (["--no-plugin", "nobody"], ["is not installed"]),
        (["OPTIM.NAME", "sgd", "OPTIM.ADAM_BETA1", "0.5"], ["OPTIM.ADAM_BETA1 (set by command line) would be ignored"]),
        (["DATASET.NUM_LABELED", "5"], ["DATASET.NUM_LABELED", "would be ignored", "a plugin's"]),
        (["TRAIN.COUNT_ITER", "train_u"], ["TRAIN.COUNT_ITER", "would be ignored", "unlabelled"]),
        (["DATALOADER.TRAIN_X.N_INS", "3"], ["TRAIN_X.N_INS", "would be ignored", "RandomClassSampler"]),
        (["OPTIM.WARMUP_EPOCH", "1", "OPTIM.WARMUP_TYPE", "constant", "OPTIM.WARMUP_MIN_LR", "1e-6"], ["WARMUP_TYPE linear"]),
        (["INPUT.TRANSFORMS", "('normalize', 'normalize')"], ["INPUT.TRANSFORMS names 'normalize' twice", "leave one out"]),
        (["INPUT.CUTOUT_N", "3"], ["INPUT.CUTOUT_N", "would be ignored", "add 'cutout' to INPUT.TRANSFORMS"]),
        (["PROTOCOL.NAME", "active"], ["PROTOCOL.NAME is 'active'", "promptmix run"]),
        (["MODEL.BACKBONE.TOKENIZER", "x"], ["MODEL.BACKBONE.TOKENIZER is 'x'", "tiny-vit has its own"]),
        (["OUTPUT_DIR", "~/x"], ["OUTPUT_DIR is '~/x'"]),
        (["OUTPUT_DIR", " "], ["OUTPUT_DIR is ' '", "names no folder"]),
        (["TEST.SPLIT", "val", "DATASET.IMAGEFOLDER.SPLIT_RATIO", "(0.5, 0.0, 0.5)"], ["TEST.SPLIT is 'val'", "no val part"]),
    ],
)
def test_train_refuses(train, capsys, more, words):
    fails(capsys, [*train, *more], *words)


def test_a_size_that_does_not_fit_leaves_nothing(train, tmp_path, capsys):
    fails(capsys, [*train, "INPUT.SIZE", "(32, 32)"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["prompt_learner", "tensorboard"])
def test_a_run_does_not_write_through_links(train, tmp_path, capsys, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    fails(capsys, train, f"{name} is a link to another folder", "remove the link")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_the_config_of_a_run_that_was_cut_off(train, tmp_path, capsys):
    (tmp_path / "out" / "prompt_learner").mkdir(parents=True)
    (tmp_path / "out" / "prompt_learner" / "checkpoint").write_text("model.pth.tar-1\n")
    for text in ("", "[1]", "DATASET: 5", "a: b: c", "TRAINER: {NAME: 5}"):
        (tmp_path / "out" / "run_config.yaml").write_text(text)
        fails(capsys, train, "run_config.yaml")


def test_commands_say_what_they_would_pass_over(train, capsys):
    fails(capsys, ["estimate", *train[1:], "--eval-only"], "--eval-only is for a test")
    run = ["run", "few-shot", "--trainer", "CoOp", "--datasets", "EmojiFamilies"]
    fails(capsys, [*run, "--seeds", "1", "2", "1"], "CoOp EmojiFamilies 16 shots seed 1 is there twice")
    fails(capsys, [*run, "--seeds", "1", "--shots", "0", "-1"], "are one run twice")
    fails(capsys, ["estimate", *train[1:], "--coop-repo", "x"], "--coop-repo x", "--config-file")
    fails(capsys, [*train, "--dassl", "theirs"], "--dassl theirs is for --coop-repo")
    fails(capsys, [*train, "--eval-only", "--no-train"], "--no-train is for a training")
    fails(capsys, [*train, "--eval-only", "--resume", "x"], "--resume is for a training")
    fails(capsys, [*train, "--eval-only"], "--eval-only without --model-dir", "CoOp would be tested as it is before training")
    for words in (["eval", "run", "--on", ""], ["eval", "run", "--on="], ["list", "--plugin", ""]):
        fails(capsys, words, "is empty; give it a value, or leave it out")
    fails(capsys, ["list", ""], "an empty word")


def test_an_output_below_a_file_leaves_no_process_to_fail(pictures, capsys):
    fails(capsys, ["quickstart", "--output-dir", pictures / "ant" / "0.png"], "--output-dir", "0.png", "choose another")


def test_a_sample_stays_out_of_other_pictures(pictures, capsys):
    fails(capsys, ["data", "sample", pictures], "'ant'", "name a new folder")
    assert sorted(path.name for path in pictures.iterdir()) == ["ant", "bee"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OPTIM: {LR: 0.1, LR: 0.2}", "key 'LR' appears twice"),
        ("a: 1\na: 2", "appears twice"),
        ("OPTIM: {MAX_EPOCH: 010}", "010 is a number to the base 8 in YAML"),
        ("OPTIM: {LR: 1:30.5}", "1:30.5 is a number to the base 60 in YAML"),
        ("_BASE_: bad.yaml", "leads back to itself"),
        ("_BASE_: 3", "must be the path"),
        ("_BASE_:", "must be the path"),
        ("OPTIM.LR: 0.1\nOPTIM: {LR: 0.2}", "OPTIM.LR' is there twice"),
        ("_BASE_: pipe", "is not a file"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 5000, "nested too deep"),
        ("OPTIM: {LR: 2024-13-45}", "not valid YAML"),
        (f"OPTIM: {{LR: {'9' * 5000}}}", "not valid YAML"),
        ("\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]" for n in range(8)]), "stands for more than"),
        (b"\xff\xfe\x00", "save it as UTF-8"),
        (b"a: \x01", "not valid YAML"),
        ("x: " + "a" * 5_000_000, "bytes, which no config has"),
    ],
)
def test_yaml_that_bites(tmp_path, text, words):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words) as caught:
        merge_file(get_cfg(), path)
    assert "\n" not in str(caught.value)


def test_yaml_that_does_not(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("a: &one {x: 1}\nb: {<<: *one, y: 2}\nc: [*one, *one]\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


def header(width: int, height: int) -> bytes:
    """Return a PNG that says it is ``width`` x ``height`` and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_pictures_that_are_none(tmp_path, capsys, train, pictures):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(header(60_000, 60_000))
    assert quick_problem(str(tmp_path / "pipe.png")) == "no file"
    assert "more than Pillow takes" in quick_problem(str(tmp_path / "large.png"))
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as pack:
        pack.writestr("a.png", b"")
    found = [quick_problem(f"{tmp_path}/{name}") for name in ("none.zip::a.png", "pack.zip::b.png", "pack.zip::a.png")]
    assert found == ["missing", "missing", "empty file"]
    for name in ("pipe.png", "large.png", "nul\0.png"):
        with pytest.raises(DataError, match="picture"):
            read_image(str(tmp_path / name))
    (pictures / "ant" / "0.png").unlink()
    os.mkfifo(pictures / "ant" / "0.png")
    fails(capsys, train, "0.png: no file", "--skip-bad")


def test_a_class_whose_name_is_no_text(train, pictures, capsys):
    os.rename(os.fsencode(pictures / "ant"), os.fsencode(pictures) + b"/\xff")
    fails(capsys, train, "not UTF-8 text that can be seen; rename it")
    os.rename(os.fsencode(pictures) + b"/\xff", pictures / "\u200b")
    fails(capsys, train, "class or domain '\\u200b' is not")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["ant/0.png,ant", "ant/0.png,ant"], "is in line 2 and in line 3"),
        (["../elsewhere/0.png,ant"], "lies outside"),
        (["/etc/0.png,ant"], "lies outside"),
        (["ant/0.png,ant,train,extra"], "line 2: needs path,label"),
        (["ant/0.png,ant"], "as many cells as the first line"),
        (["ant/\0.png,ant,"], "line 2: needs path,label"),
        (["ant/0.png," + "x" * 200_000], "field larger"),
    ],
)
def test_tables_that_are_wrong(train, pictures, capsys, lines, words):
    columns = "path,label,split" if "," in lines[0].partition(",")[2] or "cells" in words else "path,label"
    (pictures / "labels.csv").write_text("\n".join([columns, *lines]) + "\n")
    fails(capsys, [*train, "DATASET.NAME", "CSV"], words)


def test_a_table_that_is_no_text_or_one_long_line(tmp_path):
    table = tmp_path / "t.csv"
    for content, words in ((b"\xff\xfep\0", "UTF-8"), (b"x" * 200_000, "line 1: field larger")):
        table.write_bytes(content)
        with pytest.raises(DataError, match=f"{words}.*columns"):
            list(picture_paths(table))


def test_predictions_for_odd_input(train, tmp_path, pictures, capsys):
    assert main(train) == 0
    capsys.readouterr()
    predictor = promptmix.load(tmp_path / "out")
    picture = str(pictures / "ant" / "0.png")
    for options, words in (
        ({"classnames": "cat"}, "give a list of names"),
        ({"classnames": [1]}, "give a list"),
        ({"classnames": 3}, "give a list"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"classnames": ["\ud800", "b"]}, "give a list"),
        ({"unreadable": "x"}, "unreadable is 'x'"),
        ({"embeddings": 1}, "embeddings is 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            predictor.predict(picture, **options)
    for images in ([None], 5, np.zeros(()), (pictures / "ant" / "0.png").open("rb")):
        for ask in (predictor.predict, predictor.stream):
            with pytest.raises(ConfigError, match="give paths, PIL pictures"):
                list(ask(images))
    assert [one.image for one in predictor.stream(picture)] == [picture]
    with pytest.raises(ZeroDivisionError):  # the caller's own
        predictor.predict(1 / 0 for _ in "a")
    odd = {"device": 5, "reading": ["upright"], "weights": 5, "descriptions": {}, "epoch": 10**400, "temperature": 10**400}
    for name, value in odd.items():
        with pytest.raises(ConfigError, match=f"{name} is "):
            promptmix.load(tmp_path / "out", **{name: value})
    for merge, value in ((merge_file, None), (merge_opts, {"SEED": 1})):
        with pytest.raises(ConfigError, match="give the path|must be a list"):
            merge(get_cfg(), value)
    for run in (None, 3, b"out"):
        with pytest.raises(ConfigError, match="give the output folder"):
            promptmix.load(run)
    with pytest.raises(ConfigError, match="epoch is 'last'"):
        promptmix.load(tmp_path / "out", epoch="last")
    ask = ["predict", "--model-dir", str(tmp_path / "out"), "--format", "csv"]
    fails(capsys, [*ask, picture, "--classnames", "missing.txt"], "missing.txt: No such file")
    (pictures / "ant" / "1.png").write_bytes(b"broken")
    assert main([*ask, str(pictures)]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 12
    assert "1.png" in shown.err
    assert "left out" in shown.err
    assert main([*ask, str(pictures), "--skip-bad"]) == 0
    capsys.readouterr()
    fails(capsys, [*ask, pictures / "ant" / "1.png"], "1.png")


@pytest.mark.skipif(os.name == "nt", reason="a current folder can't be removed on this system")
def test_a_current_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    fails(capsys, ["list"], "the current folder can't be read (No such file or directory); change to another one (cd)")


def test_a_second_folder_for_parse(capsys):
    fails(capsys, ["parse", "a", "b"], "'b' is one too many", "takes DIR")


def test_flags_before_the_command(capsys):
    fails(capsys, ["--trainer", "CoOp", "train"], "--trainer comes before the command; write the command first")


def test_a_value_that_begins_like_a_flag(capsys):
    fails(capsys, ["train", "--root", "-pictures"], "--root: expected one argument", "joined to its flag by =")


def test_names_behind_a_flag_belong_to_those_before_it(capsys):
    """Argparse takes names of one kind in one row only; a flag among them stops nothing here."""
    fails(capsys, ["predict", "a.png", "--model-dir", "nowhere", "b.png"], "no nowhere/results.json")


def test_a_flag_is_suggested_by_its_letters(capsys):
    fails(capsys, ["estimate", "--trainr", "CoOp"], "did you mean '--trainer'")
    assert main(["estimate", "--classes", "3"]) == 2 and "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--repeats", "-1"], "--repeats is -1, but must be from 0"),
        (["--context", "4", "0"], "--context is 0"),
        (["--measure", "nan"], "--measure is nan"),
        (["--steps", "CoOp:4"], "give METHOD:BATCH:CLASSES"),
        (["--evaluations", "CoOp:0:5"], "give METHOD:BATCH:CLASSES"),
    ],
)
def test_sizes_of_a_measurement_that_can_not_be(flags, words, capsys):
    fails(capsys, ["bench", "text", *flags], words)


@pytest.mark.parametrize("command", [["parse", ""], ["report", "runs", ""], ["card", ""], ["eval", ""], ["sweep", ""]])
def test_an_empty_name_is_not_the_current_folder(command, capsys):
    fails(capsys, command, "is empty; name one")


def test_a_message_keeps_its_remedy_however_long_a_name_is():
    line, code = console.describe(DataError(f"no {'a' * 5000}; name another"))
    assert line.startswith("no aaa") and line.endswith("aaa; name another") and len(line) < 400 and code == 2


def test_what_is_unexpected_is_one_line_with_its_file(monkeypatch, capsys):
    monkeypatch.setattr("promptmix.commands.cache.run", lambda args: [][1])
    monkeypatch.setattr("promptmix.plugin_manager.strangers", list)  # tests before this one may have loaded some
    fails(capsys, ["cache"], "unexpected IndexError: list index out of range", "please report", code=console.FAULT)
    with pytest.raises(IndexError):
        main(["cache", "--debug"])
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr("promptmix.commands.cache.run", lambda args: (_ for _ in ()).throw(full))
    fails(capsys, ["cache"], "memory does not suffice", "BATCH_SIZE")


def test_a_training_that_a_full_disk_stopped_keeps_what_it_goes_on_from(train, tmp_path, monkeypatch, capsys):
    from promptmix.runs import samples

    def full(*_):
        raise OutputError("predictions.npz can't be written: No space left on device; make room")

    with monkeypatch.context() as patch:
        patch.setattr(samples, "keep", full)
        fails(capsys, [*train, "TRAIN.CHECKPOINT_FREQ", "1", "VERBOSE", "False"], "No space left")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"log.txt", "run_config.yaml", "prompt_learner"} <= kept and "results.json" not in kept
    fails(capsys, [*train, "OPTIM.LR", "0.5"], "holds another run (OPTIM.LR")
    assert main([*train, "TRAIN.CHECKPOINT_FREQ", "1", "VERBOSE", "False"]) == 0


def test_a_picture_or_package_that_can_not_be_written_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(OSError, match="full"), whole(tmp_path / "a.png") as part:
        part.write_text("half")
        raise OSError(28, "full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.png", "old")]
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    fails(
        capsys, ["new-plugin", "Foo", "--directory", tmp_path], "promptmix-foo can't be written: full; choose another --directory"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("where", "code"), [(">&-", 0), (">/dev/full", 2), ("| head -1", 0)])
def test_standard_output_that_is_closed_or_full(where, code):
    command = f"{sys.executable} -m promptmix.cli --help {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("variants: {'../elsewhere': {}}", "becomes part of a folder's name"),
        ("variants: {'..': {}}", "becomes part of a folder's name"),
        ("variants: {1: {}}", "names must be text"),
        ("protocols: [[few-shot]]", "must be a list of names"),
        ("trainers: [{name: CoOp, label: a/b}]", "becomes part of a folder's name"),
        ("root: nowhere", "root nowhere is not a folder"),
        ("seeds: [1]\nseeds: [2]", "'seeds' appears twice"),
    ],
)
def test_sweep_files_that_are_wrong(tmp_path, capsys, line, words):
    plan = {"output": "out", "protocols": "[few-shot]", "trainers": "[CoOp]", "datasets": "[EmojiFamilies]", "seeds": "[1]"}
    kept = [f"{key}: {value}" for key, value in plan.items() if not line.startswith(f"{key}:")]
    (tmp_path / "sweep.yaml").write_text("\n".join([*kept, line]) + "\n")
    fails(capsys, ["sweep", tmp_path / "sweep.yaml", "--dry-run"], words)


def test_a_data_set_that_changed_meanwhile_is_no_longer_the_run(capsys, train, pictures):
    assert main(train) == 0
    (pictures / "bee").rename(pictures / "wasp")
    fails(capsys, train, "holds a run on 2 classes", "'bee' is gone", "choose another --output-dir")


def test_a_dry_run_finds_an_output_that_cannot_be_made(capsys, tmp_path):
    file = tmp_path / "sweep.yaml"
    plan = "protocols: [few-shot]\ntrainers: [ZeroshotCLIP]\ndatasets: [EmojiFamilies]\nseeds: [1]\nconfig: quickstart.yaml\n"
    file.write_text(f"output: /proc/self/nothing\n{plan}")
    fails(capsys, ["sweep", file, "--dry-run"], "output /proc/self/nothing", "choose another in the sweep file")
    file.write_text(f"output: {tmp_path}/new/out\n{plan}")
    assert main(["sweep", str(file), "--dry-run"]) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.yaml"]
