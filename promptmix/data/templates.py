"""Hard templates that belong to no data set: OpenAI's prompt ensemble for ImageNet (facts from CLIP's prompt notebook)."""

from __future__ import annotations

from collections.abc import Sequence

#: The 80 templates of OpenAI's ImageNet ensemble, in their order.
IMAGENET_80: tuple[str, ...] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

#: The 60 that PromptSRC averages: the first 60 of those, with the plainest in front (github.com/muzairkhattak/PromptSRC,
#: trainers/imagenet_templates.py).
IMAGENET_60: tuple[str, ...] = ("a photo of a {}.", *(t for t in IMAGENET_80[:60] if t != "a photo of a {}."))

#: The 7 of the 80 that OpenAI found to do almost as well together.
IMAGENET_7: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

#: Groups of similar ones among the 80, for pictures whose data set brings none: a mixture's experts start from the first of each.
GENERAL_GROUPS: tuple[tuple[str, ...], ...] = (
    ("a photo of a {}.", "a photo of the {}.", "a photo of one {}.", "a photo of my {}."),
    ("a good photo of a {}.", "a bright photo of a {}.", "a photo of a clean {}.", "a photo of a nice {}."),
    ("a bad photo of a {}.", "a blurry photo of a {}.", "a dark photo of the {}.", "a low resolution photo of a {}."),
    ("a close-up photo of a {}.", "a cropped photo of a {}.", "a photo of a large {}.", "a photo of a small {}."),
    ("a drawing of a {}.", "a painting of a {}.", "a sketch of a {}.", "a cartoon {}."),
)


def groups_of(templates: Sequence[str]) -> list[list[str]]:
    """Return groups for templates that came without: each its own where there are several, else the general ones behind it."""
    if len(templates) > 1:
        return [[template] for template in templates]
    general = [list(group) for group in GENERAL_GROUPS]
    return general if templates[0] == general[0][0] else [[templates[0]], *general]
