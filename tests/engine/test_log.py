"""The log file, progress, meters and the small helpers."""

import io
import sys
import threading

import numpy as np
import pytest
import torch

from promptmix.engine import AverageMeter, MetricMeter, get_logger, progress, setup_logger
from promptmix.engine import log as log_module
from promptmix.engine.log import RunLog
from promptmix.errors import DataError, OutputError
from promptmix.utils import (
    check_isfile,
    collect_env_info,
    count_num_param,
    listdir_nohidden,
    mkdir_if_missing,
    read_json,
    set_random_seed,
    tolist_if_not,
    write_json,
)


def test_log_file_has_what_the_console_has(tmp_path, capsys):
    before = sys.stdout
    with setup_logger(tmp_path / "out") as tee:
        assert sys.stdout is tee
        print("printed")
        get_logger().info("logged %d", 5)
        sys.stdout.flush()
        assert sys.stdout.encoding == before.encoding
    assert sys.stdout is before
    get_logger().info("after")
    assert (tmp_path / "out" / "log.txt").read_text() == "printed\nlogged 5\n"
    assert capsys.readouterr().out == "printed\nlogged 5\nafter\n"
    tee.close()  # a second time does nothing


def test_console_is_given_back_after_an_error(tmp_path):
    before = sys.stdout
    with pytest.raises(RuntimeError), setup_logger(tmp_path):
        raise RuntimeError
    assert sys.stdout is before
    print("the console is still open")


def test_existing_log_is_kept(tmp_path):
    for text in ("first", "second"):
        with setup_logger(str(tmp_path / "run.log")):
            print(text)
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names[0] == "run.log"
    assert names[1].startswith("run.log-20")
    assert (tmp_path / "run.log").read_text() == "first\n"


def test_no_output_no_tee():
    before = sys.stdout
    with setup_logger(None):
        assert sys.stdout is before


def test_log_is_complete_at_any_moment(tmp_path):
    with setup_logger(tmp_path):
        print("line")
        assert (tmp_path / "log.txt").read_text() == "line\n"


def test_run_log_takes_what_is_logged_and_leaves_standard_output_alone(tmp_path, capsys):
    before = sys.stdout
    with RunLog() as log:
        get_logger().info("early")
        get_logger().debug("only in the file")
        assert not list(tmp_path.iterdir())
        log.open(tmp_path / "log.txt")
        get_logger().info("late \x1b[31m")
        print("printed")
        assert sys.stdout is before
        assert (tmp_path / "log.txt").read_text() == "early\nonly in the file\nlate \\x1b[31m\n"
    get_logger().info("after")
    assert capsys.readouterr().out == "early\nlate \\x1b[31m\nprinted\nafter\n"
    assert "after" not in (tmp_path / "log.txt").read_text()


def test_full_disk_ends_a_run_with_its_remedy(tmp_path):
    with RunLog() as log, pytest.raises(OutputError, match="/dev/full can't be written: No space left on device; make room"):
        log.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115  (the log closes it)
        get_logger().info("line")


def test_progress_is_silent_when_quick_and_not_a_terminal(capsys):
    assert list(progress(range(5), desc="count")) == list(range(5))
    assert capsys.readouterr() == ("", "")


def test_progress_lines_go_to_stderr(capsys, monkeypatch):
    monkeypatch.setattr(log_module, "_LINE_EVERY", -1.0)
    assert list(progress(iter("ab"), desc="evaluate", total=2)) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["evaluate: 0/2 after 0 s", "evaluate: 1/2 after 0 s"]


def test_progress_draws_a_bar_on_a_terminal(monkeypatch, tmp_path):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with setup_logger(tmp_path):
        assert list(progress([1, 2, 3], desc="evaluate")) == [1, 2, 3]
    assert "evaluate" in terminal.getvalue()
    assert (tmp_path / "log.txt").read_text() == ""


def test_meters_print_as_dassls():
    meter = MetricMeter()
    meter.update({"loss": torch.tensor(1.0), "acc": 50})
    meter.update({"loss": 2.0, "acc": torch.tensor([100.0])})
    meter.update(None)
    assert str(meter) == "loss 2.0000 (1.5000) acc 100.0000 (75.0000)"
    with pytest.raises(TypeError, match="forward_backward must return a dict"):
        meter.update(3.0)


def test_average_meter_weights_and_ema():
    meter = AverageMeter()
    meter.update(1.0, n=3)
    meter.update(5.0)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (5.0, 2.0, 8.0, 4)
    meter.reset()
    assert (meter.avg, meter.count) == (0.0, 0)
    moving = AverageMeter(ema=True)
    moving.update(1.0)
    moving.update(2.0)
    assert moving.avg == pytest.approx(0.29)


def test_seed_covers_all_generators():
    drawn = []
    for _ in range(2):
        set_random_seed(7)
        drawn.append((np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "results.json"
    write_json({"é": [1, 2]}, path)
    assert read_json(path) == {"é": [1, 2]}
    with pytest.raises(TypeError):
        write_json({"bad": object()}, path)
    assert read_json(path) == {"é": [1, 2]}
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    path.write_text("{")
    with pytest.raises(DataError, match="results.json is not valid JSON"):
        read_json(path)
    with pytest.raises(DataError, match="gone.json: No such file .*check the path"):
        read_json(tmp_path / "gone.json")


def test_json_survives_many_writers(tmp_path):
    path = tmp_path / "shared.json"
    writers = [threading.Thread(target=write_json, args=({"n": [n] * 500}, path)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(set(read_json(path)["n"])) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["shared.json"]


def test_small_helpers(tmp_path):
    mkdir_if_missing(tmp_path / "a" / "b")
    mkdir_if_missing("")
    (tmp_path / ".hidden").touch()
    (tmp_path / "B").touch()
    assert listdir_nohidden(tmp_path, sort=True) == ["B", "a"]
    assert tolist_if_not("x") == ["x"]
    assert tolist_if_not(["x"]) == ["x"]
    assert check_isfile(tmp_path / "B")
    with pytest.warns(UserWarning, match="No file found"):
        assert not check_isfile(tmp_path / "C")
    model = torch.nn.Linear(3, 2)
    assert count_num_param(model) == count_num_param(params=[{"params": list(model.parameters())}]) == 8
    assert count_num_param(params=model.parameters()) == 8
    with pytest.raises(ValueError, match="model or parameters"):
        count_num_param()


def test_versions_fit_on_a_line():
    info = collect_env_info()
    assert "\n" not in info
    assert f"torch {torch.__version__}" in info
