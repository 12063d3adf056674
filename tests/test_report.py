"""``promptmix report``: the page's HTML, whose names are text and nothing else, what may get into it, and a browser's view."""

import base64
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from promptmix.cli import main
from promptmix.files.text import harmless
from promptmix.report import figures
from promptmix.report.reliability import reliability_of
from promptmix.report.thumbnails import SIDE, Album
from promptmix.runs import samples
from tests.runs.test_samples import kept, write

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
OPTS = ["DATASET.NAME", "ImageFolder", "DATASET.SOURCE_DOMAINS", "()", "OPTIM.MAX_EPOCH", "2", "INPUT.SIZE", "(32, 32)"]
NAUGHTY = "<script>alert(1)<&\"'\x1b[31m"  # its control character is written out with a backslash
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.places, self.ids, self.words = Counter(), [], Counter(), []
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        named = dict(attrs)
        self.places += [named[key] for key in ("src", "href", "xlink:href", "action", "data") if key in named]
        if "id" in named:
            self.ids[named["id"]] += 1
        self.events = [key for key, _ in attrs if key.startswith("on")]
        assert not self.events

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Own pictures, one class with a naughty name; CoOp and MoCoOp trained on them, and one seed of the zero-shot model."""
    folder = tmp_path_factory.mktemp("report")
    draw = np.random.default_rng(0)
    for part, count in (("train", 2), ("test", 6)):
        for name, colour in {"cat": (220, 30, 30), "dog": (30, 30, 220), NAUGHTY: (30, 200, 30)}.items():
            (folder / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + draw.integers(-60, 60, (200, 120, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / part / name / f"{i}.png")
    for trainer in ("ZeroshotCLIP", "CoOp", "MoCoOp"):
        flags = ["train", "--trainer", trainer, "--config-file", "configs/quickstart.yaml", "--root", str(folder / "data")]
        flags += ["--seed", "1", "--output-dir", str(folder / "runs" / trainer)]
        assert main([*flags, *OPTS]) == 0
    return folder


@pytest.fixture(scope="module")
def text(room):
    out = room / "report.html"
    assert main(["report", str(room / "runs"), "--out", str(out), "--root", str(room / "data")]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_says_what_it_should(text):
    page = Page(text)
    sections = ("result", "charts", "classes", "pictures", "reliability", "learning", "inside", "cost", "settings", "again")
    assert [name for name in sections if f'<section id="{name}">' not in text] == []
    words = " ".join(page.words)
    for name in ("ZeroshotCLIP", "CoOp − MoCoOp", "McNemar", "ECE", "Temperature that calibrates", "Nearest words", "shuffled"):
        assert name in words
    assert page.tags["svg"] >= 9 and page.tags["table"] >= 12 and page.tags["img"] >= 10
    assert "promptmix train --from-run" in words and "TRAINER.MOCOOP.TEXT_WEIGHT" in words


def test_names_are_text_and_nothing_is_loaded(text):
    page = Page(text)
    assert not {"script", "iframe", "link", "object", "embed", "form", "base"} & set(page.tags)
    assert any(harmless(NAUGHTY) in words for words in page.words) and "\x1b" not in text
    assert all(place.startswith(("#", "data:image/webp;base64,")) for place in page.places)
    assert not re.search(r"url\((?!['\"]?#)|@import|//[a-z]+\.[a-z]", re.sub(r'xmlns(:xlink)?="[^"]*"', "", text))
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert "default-src 'none'" in text and 'lang="en"' in text


def test_tables_can_be_read_by_ear(text):
    tables = re.findall(r"<table.*?</table>", text, re.S)
    assert all("<caption>" in one and 'scope="col"' in one and 'scope="row"' in one for one in tables)
    assert text.count('role="img"') == text.count("<svg")
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_the_numbers_are_those_of_the_runs(room, text):
    from promptmix.runs import results

    for trainer in ("ZeroshotCLIP", "CoOp", "MoCoOp"):
        run = results.load(room / "runs" / trainer / "results.json")
        assert f"{run.metrics['test']['accuracy']:.2f}" in text
        found = samples.of_run(run)
        share = 100 * found.correct[found.label == 0].mean()
        assert f"{share:.0f}%" in text


def test_pictures_come_only_from_where_the_caller_says(room, tmp_path, capsys):
    assert main(["report", str(room / "runs"), "--out", str(tmp_path / "r.html"), "--no-interpret"]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "data:image" not in text and "no picture" in text
    assert "--root DIR says where they may be read" in capsys.readouterr().err
    place, outside = tmp_path / "place", tmp_path / "secret.png"
    place.mkdir()
    Image.new("RGB", (300, 200), "red").save(outside)
    Image.new("RGB", (300, 200), "blue").save(place / "fine.png")
    (place / "link.png").symlink_to(outside)
    (place / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    album = Album(str(place))
    small = Image.open(io.BytesIO(base64.b64decode(album.thumbnail("fine.png").partition(",")[2])))
    assert small.size == (SIDE, SIDE * 2 // 3)
    assert [album.thumbnail(name) for name in ("link.png", "../secret.png", str(outside), "damaged.png", "a\0b", "none")] == [
        ""
    ] * 6
    assert album.refused == 6
    assert Album().thumbnail("emoji/openmoji_color.zip::1f408.webp").startswith("data:image/webp;base64,")


def test_a_page_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("promptmix.report.thumbnails._MOST_BYTES", 3000)
    draw = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    album = Album(str(tmp_path))
    made_ones = [bool(album.thumbnail(f"{i}.png")) for i in range(12)]
    assert made_ones[0] and not made_ones[-1] and album.refused == made_ones.count(False)


def test_half_a_character_in_a_name_ends_no_chart():
    lines = {"a\ud800": ([1.0, 2.0], [1.0, 0.5])}
    with figures.drawing():
        drawn = figures.curves(lines, "loss", "of a\ud800\u202e")
    assert drawn.encode() and "\u202e" not in drawn and "a\\ud800" in drawn


def test_a_temperature_mends_scores_that_are_too_sure(tmp_path):
    import torch

    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 5, generator=draw) * 2
    labels = torch.multinomial(scores.softmax(1), 1, generator=draw)[:, 0]  # so T = 1 is right
    for factor in (0.5, 1.0, 3.0):
        found = reliability_of([samples.read(write(tmp_path / f"{factor}.npz", kept(factor * scores, labels)))])
        assert found.temperature == pytest.approx(factor, rel=0.06)
        assert found.calibrated < 3 and (found.error > 5 or factor == 1.0)
    sure = (3.0 * scores).softmax(1)
    from promptmix.runs.calibration import expected_error

    assert found.error == pytest.approx(expected_error(sure, labels), abs=1e-3)


def test_runs_without_predictions_have_a_page_too(room, tmp_path, capsys):
    shutil.copytree(room / "runs" / "CoOp", tmp_path / "run")
    (tmp_path / "run" / "predictions.npz").unlink()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html"), "--no-interpret"]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "--eval-only" in text and '<section id="result">' in text and '<section id="pictures">' not in text


def test_bad_calls_end_in_one_line(room, tmp_path, capsys, monkeypatch):
    runs = str(room / "runs")
    for flags, words in {
        (runs, "--out", str(tmp_path / "r.pdf")): "must name a file that ends in .html",
        (str(tmp_path), "--out", str(tmp_path / "r.html")): "no results.json",
        (runs, "--out", str(tmp_path / "r.html"), "--root", "nowhere"): "--root nowhere: no such folder",
        (runs, "--out", str(tmp_path / "r.html"), "--weights", "gone.pt"): "--weights gone.pt: no such file",
        (runs, "--out", str(tmp_path / "r.html"), "--plugin", "nowhere.py"): "--plugin nowhere.py: no such file",
        (runs, "--out", str(tmp_path / "r.html"), "--no-interpret", "--compare", "Coop"): "did you mean 'CoOp'",
    }.items():
        assert main(["report", *flags]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in err and not (tmp_path / "r.html").exists()
    monkeypatch.setattr("promptmix.report.page.importlib.util.find_spec", lambda name: None)
    assert main(["report", runs, "--out", str(tmp_path / "r.html"), "--no-interpret"]) == 2
    assert "promptmix[report]" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "nowhere", "--out", str(tmp_path / "r.html")]) == 2  # before the runs are looked at
    assert "a report needs matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it(room, text, tmp_path, width):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"]
    shot = tmp_path / "shot.png"
    command = [BROWSER, *flags, f"--window-size={width},1400", f"--screenshot={shot}", (room / "report.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    assert pixels.shape == (1400, width)
    ink = np.abs(pixels - pixels[2, 2]) > 60
    assert 0.005 < ink.mean() < 0.5
    assert not ink[:, : width // 100].any() and not ink[:, -width // 100 :].any()  # nothing runs over the edges


def test_shots_are_told_apart(room, tmp_path):
    for shots in (1, 2):
        for trainer in ("CoOp", "KgCoOp"):
            flags = ["train", "--trainer", trainer, "--config-file", "configs/quickstart.yaml", "--root", str(room / "data")]
            flags += ["--seed", "1", "--output-dir", str(tmp_path / trainer / str(shots)), "DATASET.NUM_SHOTS", str(shots)]
            assert main([*flags, *OPTS]) == 0
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html"), "--no-interpret"]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    for name in ("CoOp, 1 shots", "KgCoOp, 2 shots", "test, 1 shots", "test, 2 shots", "chart shots-all-classes-test"):
        assert name in text
    curves = text.split('<section id="learning">')[1].split("</section>")[0]
    assert curves.count("CoOp, 1 shots") == 4  # two methods, loss and accuracy
