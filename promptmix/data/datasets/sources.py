"""Where the benchmark data sets can be had: public links with their checksums, or what a human must do.

Links and MD5 sums are those of ``torchvision.datasets`` (0.29) where it has the data set, else of the data set's authors or of
CoOp's DATASETS.md; an empty checksum means that none is published.
"""

from __future__ import annotations

from dataclasses import dataclass

_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks"
_HUGGING = "https://huggingface.co/datasets"


def _drive(file_id: str) -> str:
    return f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: its public link.
        file: name to keep it under in the data set's folder.
        md5: checksum, "" where none is published.
        inside: folder in the archive that is wanted; "" = a plain file, not an archive.
        to: name that it gets in the data set's folder; "." puts its content there.
        inner: archive inside the archive that holds ``inside``.
        optional: the data set works without it.
    """

    url: str
    file: str
    md5: str = ""
    inside: str = ""
    to: str = "."
    inner: str = ""
    optional: bool = False


#: Data set -> what to download. Without an entry it can't be downloaded by a program, see `BY_HAND`.
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "Caltech101": (
        Archive(
            "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
            "caltech-101.zip",
            "3138e1922a9193bfa496528edbbc45d0",
            "101_ObjectCategories",
            "101_ObjectCategories",
            inner="caltech-101/101_ObjectCategories.tar.gz",
        ),
    ),
    "OxfordPets": (
        Archive(f"{_OXFORD}/pets/data/images.tar.gz", "images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "images", "images"),
    ),
    "OxfordFlowers": (
        Archive(f"{_OXFORD}/flowers/102/102flowers.tgz", "102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "jpg", "jpg"),
    ),
    "Food101": (
        Archive(
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87", "food-101"
        ),
        Archive(_drive("1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"), "split_zhou_Food101.json", optional=True),
    ),
    "FGVCAircraft": (
        Archive(
            f"{_OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
            "fgvc-aircraft-2013b.tar.gz",
            inside="fgvc-aircraft-2013b/data",
        ),
    ),
    "SUN397": (
        Archive(
            "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
            "SUN397.tar.gz",
            "8ca2778205c41d23104230ba66911c7a",
            "SUN397",
            "SUN397",
        ),
    ),
    "DescribableTextures": (
        Archive(f"{_OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", "dtd"),
    ),
    "EuroSAT": (
        Archive(
            f"{_HUGGING}/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
            "2750",
            "2750",
        ),
    ),
    "UCF101": (
        Archive(
            _drive("10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"),
            "UCF-101-midframes.zip",
            inside="UCF-101-midframes",
            to="UCF-101-midframes",
        ),
    ),
    "ImageNetV2": (
        Archive(
            f"{_HUGGING}/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
            "imagenetv2-matched-frequency.tar.gz",
            inside="imagenetv2-matched-frequency-format-val",
            to="imagenetv2-matched-frequency-format-val",
        ),
    ),
    "ImageNetSketch": (
        Archive(
            f"{_HUGGING}/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip",
            "ImageNet-Sketch.zip",
            inside="sketch",
            to="images",
        ),
    ),
    "ImageNetA": (
        Archive(f"{_BERKELEY}/imagenet-a.tar", "imagenet-a.tar", "c3e55429088dc681f30d81f4726b6595", "imagenet-a", "imagenet-a"),
    ),
    "ImageNetR": (
        Archive(f"{_BERKELEY}/imagenet-r.tar", "imagenet-r.tar", "a61312130a589d0ca1a8fca1f2bd3337", "imagenet-r", "imagenet-r"),
    ),
}

#: Files that torchvision unpacks once a human has put them into ``imagenet/images``.
IMAGENET_FILES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")

#: Data set -> what a human must do.
BY_HAND: dict[str, str] = {
    "ImageNet": (
        "ImageNet asks you to register and accept its terms: sign in at https://image-net.org/download-images, put "
        f"{', '.join(IMAGENET_FILES)} into {{folder}}/images and run this command again (it needs scipy)"
    ),
    "StanfordCars": (
        "the authors' links are gone and no public one is known: get the pictures by hand (Kaggle has copies, for which you "
        "accept its terms) and put the folders cars_train and cars_test into {folder}"
    ),
}
