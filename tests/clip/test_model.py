"""Frozen parts run in inference mode, and what they give may still meet tensors that learn."""

from __future__ import annotations

import torch

from promptmix.clip.reference import plain_towers
from tests.trainers.golden import golden_clip, images

NAMES = ["dog", "sea lion", "bus"]


def test_frozen_features_are_made_in_inference_mode_and_left_as_ordinary_tensors():
    clip = golden_clip()
    modes = []
    clip.text.ln_final.register_forward_hook(lambda *args: modes.append(torch.is_inference_mode_enabled()))
    for features in (
        clip.hard_features(["a photo of a {}."], NAMES),
        clip.ensemble(["a photo of a {}.", "a {}."], NAMES),
        clip.encode_frozen(lambda: clip.encode_image(images())),
    ):
        learned = torch.ones(features.shape[-1], requires_grad=True)
        (features * learned).sum().backward()
        assert learned.grad.isfinite().all() and not features.is_inference()
    assert modes == [True] * 3
    templates = ["a photo of a {}.", "a {}."]
    ours = clip.ensemble(templates, NAMES)
    with plain_towers(clip):
        torch.testing.assert_close(clip.ensemble(templates, NAMES), ours)
    assert modes == [True] * 5 + [False] * 2


def test_what_inference_mode_left_in_caches_serves_steps_that_learn():
    clip = golden_clip()
    names = clip.tokenizer.class_tokens(["zebra crossing", "one-off name of this test"])  # shapes that no other test has cached
    context = torch.randn(3, 7, clip.text.width)
    prompts = clip.encode_frozen(lambda: clip.text(clip.text.compose(context, names)))
    learned = context.clone().requires_grad_()
    features = clip.text(clip.text.compose(learned, names))
    features.sum().backward()
    torch.testing.assert_close(features, prompts)
    assert learned.grad.abs().max() > 0


def test_patch_features_are_normalised():
    clip, one = golden_clip(), images()[:1]
    image, patches = clip.encode_both(one)
    assert patches.shape == (1, clip.image.patches, clip.embed_dim)
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(1, clip.image.patches))
    torch.testing.assert_close(clip.encode_tokens(one), patches)
    torch.testing.assert_close(clip.encode_image(one), image)
