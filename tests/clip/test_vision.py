"""The image tower: prompts per layer, and towers that take none."""

from __future__ import annotations

import open_clip
import pytest
import torch

from promptmix.clip import ImageTower, PromptStep
from promptmix.errors import ConfigError


def vit(**changes) -> ImageTower:
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 3, "width": 64, "patch_size": 8, **changes}
    return ImageTower(open_clip.CLIP(24, vision, {"width": 32, "heads": 2, "layers": 1}).visual).eval().requires_grad_(False)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_without_prompts_it_is_open_clips_tower():
    tower = vit()
    torch.testing.assert_close(tower(IMAGES), tower.visual(IMAGES))


def test_steps_that_change_nothing_change_nothing():
    tower = vit()
    steps = {i: PromptStep(None) for i in range(3)}
    torch.testing.assert_close(tower(IMAGES, steps), tower.visual(IMAGES))


def test_replace_append_and_carry():
    """Layers see the number of tokens that the steps say; 5 are the class token and four patches."""
    tower, seen = vit(), []
    for block in tower.visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    first, second, third = (torch.randn(n, 64) for n in (2, 2, 3))
    tower(IMAGES, {0: PromptStep(first), 1: PromptStep(second, remove=2), 2: PromptStep(third, remove=1)})
    assert [x.shape[1] for x in seen] == [7, 7, 9]
    torch.testing.assert_close(seen[0][:, 5:], tower.visual.ln_pre(first).expand(2, -1, -1))
    torch.testing.assert_close(seen[1][:, 5:], second.expand(2, -1, -1))
    torch.testing.assert_close(seen[2][:, 6:], third.expand(2, -1, -1))


def test_prompts_of_their_own_for_each_image_get_gradients():
    tower = vit()
    prompt = torch.randn(2, 4, 64, requires_grad=True)
    tower(IMAGES, {1: PromptStep(prompt)}).square().sum().backward()
    assert prompt.grad.abs().amax(dim=(1, 2)).min() > 0


def test_a_resnet_refuses_prompts():
    tower = vit(layers=[1, 1, 1, 1], width=8, patch_size=None, image_size=32)
    assert not tower.takes_prompts
    with pytest.raises(ConfigError, match=r"ModifiedResNet takes no visual prompts; choose a vision transformer"):
        tower(torch.randn(1, 3, 32, 32), {0: PromptStep(torch.randn(1, 64))})
    with pytest.raises(ConfigError, match="ModifiedResNet"):
        _ = tower.width
