"""What the 15 benchmark data sets are: one description each, on CoOp's folder layout; readers and checks go by these alone.

Folders, split files and the first template are CoOp's (github.com/KaiyangZhou/CoOp, commit ff61507). Further templates are
those that OpenAI published for the data set (github.com/openai/CLIP, data/prompts.md). The template groups are MoCoOp's
(github.com/dyabel/mocoop, commit 04b5d2a, configs/datasets), including Caltech101's odd "texture" group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from promptmix.data.templates import IMAGENET_80

Templates = tuple[str, ...]

_QUALITY: tuple[Templates, ...] = (
    (
        "a low resolution photo of the {}.",
        "a low resolution photo of a {}.",
        "a pixelated photo of the {}.",
        "a pixelated photo of a {}.",
    ),
    ("a good photo of the {}.", "a good photo of a {}."),
)
_PHOTO, _MANY = ("a photo of a {}.",), ("a photo of many {}.",)
_LARGE = ("a photo of the large {}.", "a photo of a large {}.")

#: MoCoOp's groups for ImageNet. Its own lists for the four variants are shorter; here they have ImageNet's, so that what was
#: learned on ImageNet can be tested on them.
_IMAGENET_GROUPS: tuple[Templates, ...] = (
    ("a photo of a {}, a type of flower.",),
    ("a photo of a person doing {}.",),
    ("a centered satellite photo of {}.",),
    ("a photo of a {}, a type of aircraft.",),
    ("itap of a {}.", "itap of the {}."),
    _LARGE,
    ("art of the {}.", "a rendering of a {}.", "a rendering of the {}."),
    ("a photo of the small {}.",),
    _PHOTO,
    _MANY,
    (*_QUALITY[0], "a jpeg corrupted photo of the {}.", "a blurry photo of a {}.", "a bad photo of the {}."),
    ("a cropped photo of the {}.", "a cropped photo of a {}."),
    ("a bright photo of the {}.",),
    _QUALITY[1],
    ("a close-up photo of the {}.",),
    ("a photo of the clean {}.",),
    ("a {} in a video game.",),
    ("a photo of the hard to see {}.",),
    ("a origami {}.",),
    ("{} texture.",),
)

_CALTECH_KINDS = (
    *("painting of a", "plastic", "sculpture of a", "sketch of a", "tattoo of a", "toy", "rendition of a"),
    *("embroidered", "cartoon", "plushie", "origami", "drawing of a", "doodle of a"),
)


def _caltech() -> Templates:
    """Return OpenAI's 34 templates for Caltech101: each medium with "a" and with "the"."""
    found = [*_PHOTO, "a {} in a video game.", "art of a {}.", "graffiti of a {}.", "a photo of the {}."]
    found += [f"a {kind} {{}}." for kind in _CALTECH_KINDS]
    of_the = [kind.replace("of a", "of the") for kind in _CALTECH_KINDS]
    found += [f"{'a' if ' of ' in kind else 'the'} {kind} {{}}." for kind in of_the]
    return (*found, "the {} in a video game.", "art of the {}.", "graffiti of the {}.")


def _ucf() -> Templates:
    """Return OpenAI's 48 templates for UCF101: six verbs, two articles, four kinds of record."""
    return tuple(
        f"a {record} of {article} person {verb}{{}}."
        for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
        for article in ("a", "the")
        for record in ("photo", "video", "example", "demonstration")
    )


@dataclass(frozen=True)
class Description:
    """One data set.

    Attributes:
        name: name in the registry.
        folder: folder below ``DATASET.ROOT``.
        images: folder of the pictures below ``folder``; paths in the split are relative to it. "" = ``folder`` itself.
        kind: how it is read, a key of ``promptmix.data.datasets.readers.READERS``.
        template: CoOp's template.
        more_templates: further templates of the ensemble.
        groups: MoCoOp's template groups.
        split: split file, ``split_zhou_<split>.json``; "" = the kind needs none.
        expected: pictures in each part of the whole data set, for ``promptmix data check``.
        classes: number of classes.
        test_only: made for testing; training and test part are the same, as in CoOp.
        terms: whose pictures, and under which terms.
    """

    name: str
    folder: str
    images: str
    kind: str
    template: str
    more_templates: Templates = ()
    groups: tuple[Templates, ...] = ()
    split: str = ""
    expected: Mapping[str, int] = field(default_factory=dict)
    classes: int = 0
    test_only: bool = False
    terms: str = ""

    @property
    def templates(self) -> list[str]:
        """CoOp's template first, then the others, each once."""
        return list(dict.fromkeys((self.template, *self.more_templates)))

    @property
    def split_file(self) -> str:
        """Name of the split file, "" where there is none."""
        return f"split_zhou_{self.split}.json" if self.split else ""


def _split(
    name: str, folder: str, images: str, template: str, counts: tuple[int, int, int], classes: int, **more: object
) -> Description:
    expected = dict(zip(("train", "val", "test"), counts, strict=True))
    options: dict[str, object] = {"kind": "split", "split": name, "expected": expected, "classes": classes} | more
    return Description(name, folder, images, template=template, **options)  # type: ignore[arg-type]


def _imagenet(
    name: str, folder: str, images: str, kind: str, counts: dict[str, int], terms: str, classes: int = 1000
) -> Description:
    more = {"more_templates": IMAGENET_80, "groups": _IMAGENET_GROUPS, "test_only": kind != "imagenet"}
    return Description(
        name,
        folder,
        images,
        kind,
        _PHOTO[0],
        expected=counts,
        classes=classes,
        terms=terms,
        **more,  # type: ignore[arg-type]
    )


_NON_COMMERCIAL = "pictures for non-commercial research"

DESCRIPTIONS: dict[str, Description] = {
    entry.name: entry
    for entry in (
        _imagenet(
            "ImageNet",
            "imagenet",
            "images",
            "imagenet",
            {"train": 1_281_167, "test": 50_000},
            "registration at image-net.org, non-commercial research and education",
        ),
        _split(
            "Caltech101",
            "caltech-101",
            "101_ObjectCategories",
            "a photo of a {}.",
            (4128, 1649, 2465),
            100,
            more_templates=_caltech(),
            groups=(("{} texture.",), _PHOTO, _MANY, *_QUALITY),
            terms="CC BY 4.0",
        ),
        _split(
            "OxfordPets",
            "oxford_pets",
            "images",
            "a photo of a {}, a type of pet.",
            (2944, 736, 3669),
            37,
            groups=(("a photo of the small {}.",), _LARGE, _PHOTO, _MANY, *_QUALITY),
            terms="CC BY-SA 4.0",
        ),
        _split(
            "StanfordCars",
            "stanford_cars",
            "",
            "a photo of a {}.",
            (6509, 1635, 8041),
            196,
            more_templates=(
                "a photo of the {}.",
                "a photo of my {}.",
                "i love my {}!",
                *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
            ),
            groups=(
                tuple(f"A photo of the {kind} {{}}." for kind in ("high-performance", "modern", "fast")),
                _PHOTO,
                _MANY,
                *_QUALITY,
            ),
            terms=_NON_COMMERCIAL,
        ),
        _split(
            "OxfordFlowers",
            "oxford_flowers",
            "jpg",
            "a photo of a {}, a type of flower.",
            (4093, 1633, 2463),
            102,
            groups=(("a photo of a {}, a type of flower.",), _PHOTO, _MANY, *_QUALITY),
            terms="pictures from the web, research",
        ),
        _split(
            "Food101",
            "food-101",
            "images",
            "a photo of {}, a type of food.",
            (50_500, 20_200, 30_300),
            101,
            kind="folder-split",
            groups=(
                _PHOTO,
                ("a photo of the delicious {}.", "a photo of the tasty {}.", "A dish of the {}."),
                *_QUALITY,
            ),
            terms="pictures of foodspotting.com, scientific fair use",
        ),
        _split(
            "FGVCAircraft",
            "fgvc_aircraft",
            "images",
            "a photo of a {}, a type of aircraft.",
            (3334, 3333, 3333),
            100,
            kind="aircraft",
            split="",
            more_templates=("a photo of the {}, a type of aircraft.",),
            groups=(("a photo of a {}, a type of aircraft.",), _PHOTO, _MANY, *_QUALITY),
            terms=_NON_COMMERCIAL,
        ),
        _split(
            "SUN397",
            "sun397",
            "SUN397",
            "a photo of a {}.",
            (15_880, 3970, 19_850),
            397,
            more_templates=("a photo of the {}.",),
            groups=(_PHOTO, _MANY, *_QUALITY),
            terms="pictures from the web, research",
        ),
        _split(
            "DescribableTextures",
            "dtd",
            "images",
            "{} texture.",
            (2820, 1128, 1692),
            47,
            more_templates=tuple(
                f"a photo of {article} {{}} {thing}."
                for article in ("a", "the")
                for thing in ("texture", "pattern", "thing", "object")
            ),
            groups=(("{} texture.",), _PHOTO, _MANY, *_QUALITY),
            terms="pictures from the web, research",
        ),
        _split(
            "EuroSAT",
            "eurosat",
            "2750",
            "a centered satellite photo of {}.",
            (13_500, 5400, 8100),
            10,
            more_templates=("a centered satellite photo of a {}.", "a centered satellite photo of the {}."),
            groups=(
                ("a centered satellite photo of {}.",),
                _PHOTO,
                _LARGE,
                ("a photo of the small {}.", "a photo of a small {}."),
                *_QUALITY,
            ),
            terms="MIT",
        ),
        _split(
            "UCF101",
            "ucf101",
            "UCF-101-midframes",
            "a photo of a person doing {}.",
            (7639, 1898, 3783),
            101,
            more_templates=_ucf(),
            groups=(("a photo of a person doing {}.",), ("a {} in a video game.",), _PHOTO, _MANY, *_QUALITY),
            terms="frames of web videos, research",
        ),
        _imagenet(
            "ImageNetV2",
            "imagenetv2",
            "imagenetv2-matched-frequency-format-val",
            "numbered",
            {"test": 10_000},
            "MIT (collection); pictures of Flickr users",
        ),
        _imagenet("ImageNetSketch", "imagenet-sketch", "images", "wnids", {"test": 50_889}, "pictures from the web, research"),
        _imagenet("ImageNetA", "imagenet-adversarial", "imagenet-a", "wnids", {"test": 7500}, "MIT (collection)", classes=200),
        _imagenet("ImageNetR", "imagenet-rendition", "imagenet-r", "wnids", {"test": 30_000}, "MIT (collection)", classes=200),
    )
}
