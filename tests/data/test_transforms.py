"""Transforms: the same pixels as plain torchvision in Dassl's order, and the log lines that say what is done."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from promptmix.config import get_cfg_default
from promptmix.data import build_transform
from promptmix.data.reading.randaugment import RandAugment, RandAugment2, RandAugmentFixMatch
from promptmix.data.reading.transforms import CHOICES
from promptmix.errors import ConfigError
from promptmix.utils import set_random_seed

SIZE = (32, 48)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
BICUBIC = InterpolationMode.BICUBIC


def picture():
    # Smooth in both directions, so that a resize or shift of a single pixel shows.
    y, x = np.mgrid[0:44, 0:70]
    channels = [3 * x + y, 5 * y, 2 * x + 3 * y]
    return Image.fromarray(np.stack([(c % 256).astype(np.uint8) for c in channels], axis=-1))


def input_cfg(*names, **keys):
    cfg = get_cfg_default()
    cfg.INPUT.SIZE, cfg.INPUT.INTERPOLATION, cfg.INPUT.TRANSFORMS = SIZE, "bicubic", names
    cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD = MEAN, STD
    for key, value in keys.items():
        cfg.INPUT[key] = value
    return cfg


PLAIN = {
    (): lambda: [T.Resize(SIZE, BICUBIC)],
    ("random_flip", "random_resized_crop"): lambda: [
        T.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=BICUBIC),
        T.RandomHorizontalFlip(),
    ],
    ("random_crop",): lambda: [T.RandomCrop(SIZE, padding=4)],
    ("imagenet_policy",): lambda: [T.Resize(SIZE, BICUBIC), T.AutoAugment(T.AutoAugmentPolicy.IMAGENET)],
    ("cifar10_policy",): lambda: [T.Resize(SIZE, BICUBIC), T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)],
    ("svhn_policy",): lambda: [T.Resize(SIZE, BICUBIC), T.AutoAugment(T.AutoAugmentPolicy.SVHN)],
    ("gaussian_blur", "randomgrayscale", "colorjitter"): lambda: [
        T.Resize(SIZE, BICUBIC),
        T.ColorJitter(0.4, 0.4, 0.4, 0.1),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(21)], p=0.5),
    ],
}


@pytest.mark.parametrize("names", PLAIN, ids="+".join)
def test_training_pixels_equal_torchvision(names):
    ours = build_transform(input_cfg(*names, "normalize"), is_train=True)
    plain = T.Compose([*PLAIN[names](), T.ToTensor(), T.Normalize(MEAN, STD)])
    for seed in range(8):
        set_random_seed(seed)
        got = ours(picture())
        set_random_seed(seed)
        assert torch.equal(got, plain(picture())), seed


@pytest.mark.parametrize("names", [("normalize",), ("random_flip", "cutout", "gaussian_noise"), ("center_crop",)])
def test_evaluation_pixels_equal_torchvision(names):
    ours = build_transform(input_cfg(*names), is_train=False)
    steps = [T.Resize(48, BICUBIC), T.CenterCrop(SIZE), T.ToTensor()]
    plain = T.Compose(steps + [T.Normalize(MEAN, STD)] * ("normalize" in names))
    assert torch.equal(ours(picture()), plain(picture()))


def test_translation_shifts_half_of_the_time():
    ours = build_transform(input_cfg("random_translation"), is_train=True)
    still = T.Compose([T.Resize(SIZE, BICUBIC), T.ToTensor()])(picture())
    kinds = set()
    for seed in range(12):
        set_random_seed(seed)
        got = ours(picture())
        random.seed(seed)
        moved = random.uniform(0, 1) <= 0.5
        kinds.add(moved)
        if moved:
            larger = F.resize(T.Resize(SIZE, BICUBIC)(picture()), [36, 54])
            left, top = round(random.uniform(0, 6)), round(random.uniform(0, 4))
            assert torch.equal(got, F.to_tensor(F.crop(larger, top, left, *SIZE)))
        else:
            assert torch.equal(got, still)
    assert kinds == {True, False}


def test_cutout_makes_square_holes():
    ours = build_transform(input_cfg("cutout", CUTOUT_N=1, CUTOUT_LEN=8), is_train=True)
    set_random_seed(3)
    got = ours(Image.new("RGB", (48, 32), "white"))
    np.random.seed(3)
    y, x = np.random.randint(32), np.random.randint(48)
    want = torch.ones(3, *SIZE)
    want[:, max(y - 4, 0) : y + 4, max(x - 4, 0) : x + 4] = 0
    assert torch.equal(got, want)


def test_noise_and_instance_norm_come_last():
    ours = build_transform(input_cfg("gaussian_noise", "instance_norm", "normalize"), is_train=True)
    for seed in range(4):
        set_random_seed(seed)
        got = ours(picture())
        set_random_seed(seed)
        want = T.Normalize(MEAN, STD)(F.to_tensor(T.Resize(SIZE, BICUBIC)(picture())))
        if random.uniform(0, 1) <= 0.5:
            want = want + torch.randn(want.size()) * 0.15
        want = (want - want.mean((1, 2), keepdim=True)) / want.std((1, 2), keepdim=True)
        assert torch.allclose(got, want, atol=1e-5)


# Recorded with Dassl's classes (its np.int replaced) on `picture()`: mean and position-weighted mean of the pixels over
# 40 seeds, which between them use every operation.
RANDAUGMENT = {
    "RandAugment": (98.8892, 48.9132),
    "RandAugment2": (112.9353, 57.6348),
    "RandAugmentFixMatch": (95.9567, 48.5571),
}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("RandAugment", lambda: RandAugment(2, 10)),
        ("RandAugment2", lambda: RandAugment2(2)),
        ("RandAugmentFixMatch", lambda: RandAugmentFixMatch(2)),
    ],
)
def test_randaugment_is_dassls(kind, make):
    transform, sums = make(), []
    for seed in range(40):
        set_random_seed(seed)
        sums.append(np.asarray(transform(picture())).astype(float))
    total = np.stack(sums)
    ramp = np.linspace(0, 1, total.size).reshape(total.shape)
    assert (total.mean(), (total * ramp).mean()) == pytest.approx(RANDAUGMENT[kind], rel=1e-3)


def test_every_choice_builds_and_gives_the_right_size():
    for name in CHOICES:
        for is_train in (True, False):
            got = build_transform(input_cfg(name), is_train=is_train)(picture())
            assert got.shape == (3, *SIZE), name
            assert got.dtype == torch.float32


def test_log_says_what_is_done(capsys):
    cfg = input_cfg("random_resized_crop", "random_flip", "normalize")
    build_transform(cfg, is_train=True)
    build_transform(cfg, is_train=False)
    # Dassl's wording, line by line.
    assert capsys.readouterr().out.splitlines() == [
        "Building transform_train",
        "+ random resized crop (size=(32, 48), scale=(0.08, 1.0))",
        "+ random flip",
        "+ to torch tensor of range [0, 1]",
        "+ normalization (mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])",
        "Building transform_test",
        "+ resize the smaller edge to 48",
        "+ 32x48 center crop",
        "+ to torch tensor of range [0, 1]",
        "+ normalization (mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])",
    ]


def test_unknown_names_are_refused_with_choices():
    with pytest.raises(ConfigError, match="unknown transform 'random_flop'; did you mean 'random_flip'.*gaussian_blur"):
        build_transform(input_cfg("random_flop"))
    with pytest.raises(ConfigError, match="INTERPOLATION is 'cubic'.*bicubic"):
        build_transform(input_cfg(INTERPOLATION="cubic"))
    with pytest.raises(ConfigError, match="RANDAUGMENT_M is 31.*0 to 30"):
        build_transform(input_cfg("randaugment", RANDAUGMENT_M=31))


def test_no_transform_and_choices():
    assert build_transform(input_cfg(NO_TRANSFORM=True)) is None
    ours = build_transform(input_cfg("normalize"), is_train=True, choices=[])
    assert torch.equal(ours(picture()), F.to_tensor(T.Resize(SIZE, BICUBIC)(picture())))
