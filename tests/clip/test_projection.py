"""Image features before the tower's last linear map, and class names that are taken verbatim."""

from __future__ import annotations

import pytest
import torch

from promptmix.clip import load_clip
from promptmix.clip.projection import last_map, unprojected
from promptmix.config.flags import make_config
from promptmix.errors import ConfigError
from tests.clip.test_vision import vit


def embedded(name):
    opts = ["TRAINER.NAME", "CoOp", "MODEL.BACKBONE.NAME", name]
    return load_clip(make_config(["configs/quickstart.yaml"], {}, opts))


@pytest.mark.parametrize(
    ("tower", "size"),
    [
        (lambda: vit(), 16),
        (lambda: vit(pool_type="avg"), 16),
        (lambda: vit(layers=[1, 1, 1, 1], width=8, patch_size=None, image_size=32), 32),
        (lambda: embedded("tiny-en").image, 128),
        (lambda: embedded("tiny-vit").image, 64),
    ],
    ids=["vit", "pooled vit", "resnet", "tiny-en", "tiny-vit"],
)
def test_the_last_map_of_unprojected_features_is_the_tower(tower, size):
    tower = tower()
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight, bias = last_map(tower)
        before = unprojected(tower, images)
        after = before @ weight if bias is None else before @ weight + bias
        assert before.shape == (3, weight.shape[0])
        torch.testing.assert_close(after, tower(images), rtol=1e-4, atol=1e-5)


def test_a_tower_without_a_last_map_is_refused():
    tower = vit()
    tower.visual.proj = None
    with pytest.raises(ConfigError, match=r"VisionTransformer does not end with a linear map; choose"):
        unprojected(tower, torch.zeros(1, 3, 16, 16))


def test_underscores_stay_where_names_are_taken_verbatim():
    clip = embedded("tiny-en")
    spaced = clip.raw_features(["a {}."], ["pine tree"])
    assert torch.equal(clip.raw_features(["a {}."], ["pine_tree"]), spaced)
    kept = clip.raw_features(["a {}."], ["pine_tree"], verbatim=True)
    assert kept.shape == (1, 1, clip.embed_dim) and not torch.allclose(kept, spaced)
    assert kept.norm() != pytest.approx(1.0, abs=1e-3)
