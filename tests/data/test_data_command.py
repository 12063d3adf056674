"""`promptmix data`: lists, findings of checks, downloads from a server of this machine."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from promptmix.cli import main
from promptmix.data.check import check
from promptmix.data.datasets import sources
from promptmix.data.datasets.descriptions import DESCRIPTIONS
from promptmix.data.datasets.readers import packaged_text, read_classnames
from promptmix.data.datasets.sources import ARCHIVES, BY_HAND, Archive
from promptmix.data.datum import Datum
from promptmix.data.download import download, unpack
from promptmix.data.prepare import prepare
from promptmix.data.reading.pictures import quick_problem
from promptmix.errors import DataError
from tests.data.trees import link_all, rows, tiny_jpeg

PETS = DESCRIPTIONS["OxfordPets"]


def pets(root: Path) -> Path:
    images = root / PETS.folder / PETS.images
    link_all(root / "one", (row[0] for items in rows("OxfordPets").values() for row in items), images)
    return images


def test_list_names_every_data_set(capsys, tmp_path):
    (tmp_path / "eurosat" / "2750").mkdir(parents=True)
    assert main(["data", "list", "--root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name in [*DESCRIPTIONS, "ImageFolder", "CSV", "EmojiFamilies"]:
        assert name in text
    there = {line.split()[0]: line.split()[-1] for line in text.splitlines()}
    assert there["EuroSAT"] == "yes" and there["OxfordPets"] == "no"


def test_every_benchmark_has_a_way_to_get_it():
    assert set(DESCRIPTIONS) == set(ARCHIVES) | set(BY_HAND)
    plain = [a.url for archives in ARCHIVES.values() for a in archives if a.url.startswith("http:") and not a.md5]
    assert plain == []  # unencrypted links only with a checksum


def test_links_and_checksums_are_torchvisions():
    from torchvision.datasets import DTD, SUN397, FGVCAircraft, Flowers102, Food101, OxfordIIITPet

    facts = {name: (archives[0].url, archives[0].md5) for name, archives in ARCHIVES.items()}
    assert facts["DescribableTextures"] == (DTD._URL, DTD._MD5)
    assert facts["Food101"] == (Food101._URL, Food101._MD5)
    assert facts["SUN397"] == (SUN397._DATASET_URL, SUN397._DATASET_MD5)
    assert facts["OxfordPets"] == OxfordIIITPet._RESOURCES[0]
    assert facts["FGVCAircraft"][0] == FGVCAircraft._URL
    file, md5 = Flowers102._file_dict["image"]
    assert facts["OxfordFlowers"] == (Flowers102._download_url_prefix + file, md5)


def test_check_of_a_whole_folder(tmp_path, capsys):
    pets(tmp_path)
    assert main(["data", "check", "OxfordPets", "--root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "all right" in text and "3669" in text


def test_check_names_a_missing_image_a_truncated_jpeg_and_a_wrong_split(tmp_path, capsys):
    images = pets(tmp_path)
    missing, cut, empty = (images / rows("OxfordPets")["test"][k][0] for k in (0, 1, 2))
    for path in (missing, cut, empty):
        path.unlink()
    whole = tiny_jpeg(tmp_path / "big.jpg", size=(64, 64)).read_bytes()
    cut.write_bytes(whole[:-60])
    empty.write_bytes(b"")
    wrong = rows("OxfordPets")
    wrong["train"][0][2] = "tiger"
    wrong["val"].append(wrong["train"][5])
    (tmp_path / "oxford_pets" / PETS.split_file).write_text(json.dumps(wrong))
    kept = tmp_path / "oxford_pets" / "split_fewshot"
    kept.mkdir()
    (kept / "shot_1-seed_1.json").write_text(json.dumps({"train": [["images/other.jpg", 0, "abyssinian"]], "val": []}))
    (kept / "shot_2-seed_1.pkl").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    assert main(["data", "check", "OxfordPets", "--root", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert f"images/{missing.name}: missing" in text
    assert f"images/{cut.name}: damaged" in text and f"images/{empty.name}: empty file" in text
    assert "wrong split: train" in text and "wrong split: val" in text
    assert "label 0 has several class names: abyssinian, tiger" in text
    assert "1 picture is in two parts" in text
    assert "shot_1-seed_1.json holds 1 picture " in text and "posix.system" in text
    assert "val has 737 pictures, 736 expected" in text and "not right" in text


def test_a_split_file_like_coops_is_not_called_wrong(tmp_path):
    pets(tmp_path)
    path = tmp_path / "oxford_pets" / PETS.split_file
    path.write_text(json.dumps(rows("OxfordPets"), indent=1))
    assert check(PETS, tmp_path, decode=False).ok
    shuffled = rows("OxfordPets")
    shuffled["train"].reverse()
    path.write_text(json.dumps(shuffled))
    assert "another order" in check(PETS, tmp_path, decode=False).findings[0]


def test_check_counts_imagenet_classes(tmp_path):
    wnids = list(read_classnames(packaged_text("imagenet_classnames.txt")))[:3]
    link_all(tmp_path / "one", (f"{part}/{w}/a.JPEG" for part in ("train", "val") for w in wnids), tmp_path / "imagenet/images")
    findings = check(DESCRIPTIONS["ImageNet"], tmp_path, decode=False).findings
    assert findings == [
        "3 classes, 1000 expected",
        "train has 3 pictures, 1,281,167 expected",
        "test has 3 pictures, 50,000 expected",
    ]


def test_pictures_that_end_oddly_are_decoded_and_pass(tmp_path):
    path = tiny_jpeg(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + b"trailing bytes of a camera")
    assert quick_problem(str(path)) == ""


def test_data_errors_are_one_line(capsys, tmp_path):
    for arguments, word in (
        (["check", "OxfordPet"], "OxfordPets"),
        (["check", "OxfordPets"], "--root"),
        (["check", "OxfordPets", "--root", str(tmp_path)], "promptmix data prepare OxfordPets"),
        (["prepare", "EmojiFamilies", "--root", str(tmp_path)], "needs no download"),
        (["prepare", "ImageNet", "--root", str(tmp_path)], "accept its terms"),
        (["prepare", "StanfordCars", "--root", str(tmp_path)], "cars_train"),
        (["check", "OxfordPets", "--root", str(tmp_path), "A.B", "1"], "takes no config keys"),
        (["list", "OxfordPets"], "takes no NAME"),
        (["list", "A.B", "1"], "takes no NAME"),
        (["list", "--fast"], "--fast is for data check"),
        (["sample", str(tmp_path), "A.B", "1"], "takes a folder alone"),
    ):
        assert main(["data", *arguments]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1


def test_check_of_ones_own_pictures(capsys, tmp_path):
    for k in range(6):
        tiny_jpeg(tmp_path / "cat" / f"{k}.jpg", size=(10 + k, 10))
        tiny_jpeg(tmp_path / "dog" / f"{k}.jpg", size=(10 + k, 20))
    command = ["data", "check", "ImageFolder", "--root", str(tmp_path), "VERBOSE", "False"]
    assert main(command) == 0
    assert "2 classes, train 6, val 2, test 4; all right" in capsys.readouterr().out
    shutil.copy(tmp_path / "cat" / "0.jpg", tmp_path / "dog" / "6.jpg")
    tiny_jpeg(tmp_path / "loose.jpg")
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "1 picture stands under two labels, such as" in out and out.count("two labels") == 1
    assert "1 picture is not in class folders and is left out" in out and "loose.jpg" in out
    assert out.rstrip().endswith("see above")


def test_copies_in_a_published_data_set_are_notes(tmp_path, monkeypatch):
    """The authors' own copies make no data set wrong, but they are counted."""
    names = ("a.jpg", "b.jpg", "c.jpg")
    for name, colour in zip(names, (5, 5, 90), strict=True):
        tiny_jpeg(tmp_path / "oxford_pets" / "images" / name, (colour, colour, colour))
    items = [Datum(str(tmp_path / "oxford_pets" / "images" / name), k % 2, 0, "xy"[k % 2]) for k, name in enumerate(names)]
    splits = {"train": items[:1], "val": [], "test": items[1:]}
    monkeypatch.setattr("promptmix.data.check.read_splits", lambda about, root: splits)
    about = replace(DESCRIPTIONS["OxfordPets"], expected={"train": 1, "val": 0, "test": 2}, classes=2)
    report = check(about, tmp_path)
    assert report.ok and len(report.notes) == 2
    assert report.notes[0].startswith("1 of 2 pictures of test is in train too") and "two labels" in report.notes[1]


# Downloads


class Server(ThreadingHTTPServer):
    """Serves ``files`` with ranges; cuts the connection after ``limit`` bytes while ``cuts`` are left."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.limit, self.cuts, self.ranges, self.resumes = {}, 0, 0, [], True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        data = server.files.get(self.path[1:])
        if data is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        start = int(wanted[6:-1]) if wanted and server.resumes else 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Content-Type", "text/html" if self.path.endswith(".html") else "application/octet-stream")
        self.end_headers()
        rest = data[start:]
        if server.cuts:
            server.cuts -= 1
            rest = rest[: server.limit]
            self.close_connection = True
        self.wfile.write(rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.mark.parametrize("resumes", [True, False])
def test_a_cut_download_goes_on(server, tmp_path, resumes):
    data = bytes(range(256)) * 100
    server.files["a.bin"], server.limit, server.cuts, server.resumes = data, 10_000, 2 if resumes else 1, resumes
    download(server.url("a.bin"), tmp_path / "a.bin", md5(data))
    assert (tmp_path / "a.bin").read_bytes() == data
    assert server.ranges == ([None, "bytes=10000-", "bytes=20000-"] if resumes else [None, "bytes=10000-"])
    assert not (tmp_path / "a.bin.part").exists()


def test_an_earlier_part_is_gone_on_from(server, tmp_path):
    data = b"0123456789" * 10
    server.files["a.bin"] = data
    (tmp_path / "a.bin.part").write_bytes(data[:30])
    download(server.url("a.bin"), tmp_path / "a.bin", md5(data))
    assert (tmp_path / "a.bin").read_bytes() == data and server.ranges == ["bytes=30-"]
    (tmp_path / "b.bin.part").write_bytes(data)  # whole, but killed before it was put in place
    download(server.url("a.bin"), tmp_path / "b.bin", md5(data))
    assert (tmp_path / "b.bin").read_bytes() == data


def test_downloads_that_fail_say_so_in_one_line(server, tmp_path):
    server.files["a.bin"], server.files["page.html"] = b"wrong", b"<html>sign in</html>"
    for url, words in (
        (server.url("a.bin"), "another file than expected"),
        (server.url("none.bin"), "404"),
        (server.url("page.html"), "web page"),
        ("http://127.0.0.1:9/a.bin", "connect to the network"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            download(url, tmp_path / "a.bin", md5(b"right"))
        assert "\n" not in str(caught.value) and not (tmp_path / "a.bin").exists()


def tar(path: Path, members: dict, **links) -> Path:
    with tarfile.open(path, "w:gz") as pack:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            pack.addfile(info)
    return path


def test_archives_that_leave_the_folder_are_refused(tmp_path):
    names = ("../evil", "a/../../evil", "/tmp/evil-promptmix", "..\\evil", "C:\\evil")
    archives = [tar(tmp_path / f"{k}.tar.gz", {"fine": b"", name: b"x"}) for k, name in enumerate(names)]
    archives.append(tar(tmp_path / "link.tar.gz", {}, a="/etc"))
    for k, name in enumerate(names):
        archives.append(tmp_path / f"{k}.zip")
        with zipfile.ZipFile(archives[-1], "w") as pack:
            pack.writestr(name, b"x")
    link = zipfile.ZipInfo("a")
    link.external_attr = 0o120777 << 16
    archives.append(tmp_path / "link.zip")
    with zipfile.ZipFile(archives[-1], "w") as pack:
        pack.writestr(link, "/etc")
    for number, archive in enumerate(archives):
        into = tmp_path / "work" / str(number)
        with pytest.raises(DataError, match="refused"):
            unpack(archive, into)
        assert not into.exists() and not (tmp_path / "work" / "evil").exists() and not (tmp_path / "evil").exists()
    (tmp_path / "half.tar.gz").write_bytes(archives[0].read_bytes()[:40])
    secret = tmp_path / "secret.zip"
    with zipfile.ZipFile(secret, "w") as pack:
        pack.writestr("a", b"x")
    content = bytearray(secret.read_bytes())
    content[6] |= 1  # in its own header, and in that of the directory: it has a password
    content[content.rindex(b"PK\1\2") + 8] |= 1
    secret.write_bytes(content)
    for archive in (tmp_path / "half.tar.gz", secret):
        with pytest.raises(DataError, match="can't unpack .*; remove it") as refusal:
            unpack(archive, tmp_path / "half")
        assert "\n" not in str(refusal.value) and not (tmp_path / "half").exists()


def test_prepare_makes_coops_layout(server, tmp_path, monkeypatch, capsys):
    picture = tiny_jpeg(tmp_path / "a.jpg").read_bytes()
    members = {f"images/{row[0]}": picture for row in rows("OxfordPets")["val"]}  # the rest is missing, and found to be
    data = tar(tmp_path / "p.tar.gz", members).read_bytes()
    server.files["images.tar.gz"] = data
    monkeypatch.setitem(
        ARCHIVES, "OxfordPets", (Archive(server.url("images.tar.gz"), "images.tar.gz", md5(data), "images", "images"),)
    )
    root = tmp_path / "data"
    assert main(["data", "prepare", "OxfordPets", "--root", str(root)]) == 1
    counts = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line[:5].strip() in ("val", "train")
    }
    assert counts == {"train": ["2944", "2944", "2944"], "val": ["736", "736", "0"]}
    assert sorted(path.name for path in (root / "oxford_pets").iterdir()) == ["images", PETS.split_file]
    prepare(PETS, root)  # again: nothing to do
    assert len(server.ranges) == 1


def test_prepare_of_nested_archives_and_contents(server, tmp_path, monkeypatch):
    picture = tiny_jpeg(tmp_path / "a.jpg").read_bytes()
    inner = tar(tmp_path / "i.tar.gz", {"101_ObjectCategories/Faces/image_0001.jpg": picture}).read_bytes()
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as pack:
        pack.writestr("caltech-101/101_ObjectCategories.tar.gz", inner)
    server.files["caltech-101.zip"] = (tmp_path / "c.zip").read_bytes()
    server.files["food.tgz"] = tar(
        tmp_path / "f.tgz", {"food-101/images/pie/1.jpg": picture, "food-101/meta/train.txt": b""}
    ).read_bytes()
    for name, file in (("Caltech101", "caltech-101.zip"), ("Food101", "food.tgz")):
        first = sources.ARCHIVES[name][0]
        replaced = Archive(server.url(file), first.file, "", first.inside, first.to, first.inner)
        split = Archive(server.url("missing.json"), "split_zhou_Food101.json", optional=True)
        monkeypatch.setitem(ARCHIVES, name, (replaced, split) if name == "Food101" else (replaced,))
        prepare(DESCRIPTIONS[name], tmp_path / "data", keep=name == "Food101")
    assert (tmp_path / "data/caltech-101/101_ObjectCategories/Faces/image_0001.jpg").is_file()
    names = sorted(path.name for path in (tmp_path / "data/food-101").iterdir())
    assert names == ["food-101.tar.gz", "images", "meta"]


def test_imagenet_is_unpacked_by_torchvision_once_its_files_are_there(tmp_path, monkeypatch):
    images = tmp_path / "imagenet" / "images"
    images.mkdir(parents=True)
    for name in sources.IMAGENET_FILES:
        (images / name).write_bytes(b"")
    calls = []
    monkeypatch.setattr("torchvision.datasets.ImageNet", lambda root, split: calls.append((root, split)))
    prepare(DESCRIPTIONS["ImageNet"], tmp_path)
    assert calls == [(str(images), "train"), (str(images), "val")]
    assert (tmp_path / "imagenet" / "classnames.txt").read_text().startswith("n01440764 tench\n")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_would_fill_the_disk_is_refused_before(tmp_path, monkeypatch, kind):
    from promptmix.data import download

    monkeypatch.setattr(download, "_ALWAYS_FINE", 1000)
    archive = tmp_path / f"bomb.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as pack:
            pack.writestr("small.txt", b"fine")
            pack.writestr("large.txt", bytes(10_000_000))
    else:
        with tarfile.open(archive, "w:gz") as pack:
            member = tarfile.TarInfo("large.txt")
            member.size = 10_000_000
            pack.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(DataError, match="is refused: unpacked it has more than 50 times its size"):
        download.unpack(archive, tmp_path / "into")
    assert not (tmp_path / "into").exists()
