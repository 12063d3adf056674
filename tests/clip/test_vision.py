"""The image tower: prompts per layer, and towers that take none."""

from __future__ import annotations

from contextlib import nullcontext

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch.utils.flop_counter import FlopCounterMode

from promptmix.clip import ImageTower, PromptStep
from promptmix.clip.reference import plain_towers
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


@pytest.mark.parametrize("changes", [{}, {"ls_init_value": 0.1}, {"no_ln_pre": True}, {"pool_type": "avg"}])
def test_leaving_out_what_nobody_reads_changes_no_number(changes):
    tower = vit(**changes)
    found, flops = [], []
    for way in (nullcontext(), plain_towers(tower)):
        prompts = [torch.randn(2, 64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2)]
        with way, FlopCounterMode(display=False) as counter:
            features = tower(IMAGES, {0: PromptStep(prompts[0]), 2: PromptStep(prompts[1], remove=2)})
            found.append([tower(IMAGES), features, *torch.autograd.grad(features.pow(3).sum(), prompts)])
        flops.append(counter.get_total_flops())
    for ours, full in zip(*found, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)
    assert flops[0] == flops[1] if "pool_type" in changes else flops[0] < 0.9 * flops[1]
    assert tower.skips_unread == ("pool_type" not in changes)


@pytest.mark.parametrize("steps", [{}, {1: PromptStep(torch.ones(2, 64))}, {1: PromptStep(torch.ones(50, 2, 64))}])
def test_pictures_in_portions_are_the_same(steps, monkeypatch):
    tower, sizes = vit(), []
    encode = tower._encode
    monkeypatch.setattr(tower, "_encode", lambda images, prompts: sizes.append(len(images)) or encode(images, prompts))
    images = torch.randn(50, 3, 16, 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    whole = tower(images, steps)
    with torch.no_grad():
        portions = tower(images, steps)
    torch.testing.assert_close(portions, whole)
    assert sizes == ([50, 50] if steps and steps[1].tokens.dim() == 3 else [50, 16, 16, 16, 2])


def test_pictures_of_a_resnet_go_through_in_portions_where_nothing_is_learned(monkeypatch):
    tower, sizes = vit(layers=[1, 1, 1, 1], width=8, patch_size=None, image_size=32).eval(), []
    monkeypatch.setattr(tower, "_whole", lambda images, _, whole=tower._whole: sizes.append(len(images)) or whole(images, _))
    images = torch.randn(11, 3, 32, 32)
    whole = tower(images)
    with torch.no_grad():
        torch.testing.assert_close(tower(images), whole, rtol=1e-5, atol=1e-5)
    assert sizes == [11, 8, 3]


def test_adapters_and_hooks_in_a_layer_are_run():
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    tower = vit()
    before = tower(IMAGES)
    for block in tower.visual.transformer.resblocks:
        block.mlp.c_fc.__class__ = Doubled
    adapted = tower(IMAGES)
    assert (adapted - before).abs().max() > 1e-3
    with plain_towers(tower):
        torch.testing.assert_close(adapted, tower(IMAGES))
    seen = []
    tower.visual.transformer.resblocks[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    tower(IMAGES)
    assert seen == [1]


def longer(mlp: torch.nn.Sequential) -> torch.nn.Module:
    return mlp.append(torch.nn.Linear(64, 64))


def wrapped(mlp: torch.nn.Sequential) -> torch.nn.Module:
    return torch.nn.Sequential(mlp, torch.nn.Linear(64, 64))


@pytest.mark.parametrize("change", [longer, wrapped])
def test_another_mlp_in_a_layer_is_run(change):
    tower = vit()
    for block in tower.visual.transformer.resblocks:
        block.mlp.gelu = QuickGELU()
        block.mlp = change(block.mlp)
    torch.testing.assert_close(tower(IMAGES), tower.visual(IMAGES))
