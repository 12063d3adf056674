"""The places where methods act, held to what four papers' released code computes there.

The methods are written out in a few lines each; the numbers were recorded from the authors' code in float32 on a CPU, on the
seeded weights of ``tests/golden``: MMA (ZjjConan/Multi-Modal-Adapter 547ee345), LwEIB (ZjjConan/VLM-LwEIB af61e135), MMRL
(yunncheng/MMRL 27d8821f) and DPL's training stage (Zhenhan-Huang/Differentiable-Prompt-Learn 9a958e87).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from promptmix.clip import CLIP, LayerAction, PromptStep
from tests.trainers.golden import golden_clip, images, labels, seeded

NAMES = tuple(seeded().CLASSNAMES)
#: One sentence a class, as the recorded run drew them for LwEIB.
SENTENCES = (
    "A dog has four legs, a tail and a wet nose.",
    "A sea lion rests on rocks by the sea.",
    "A tall red bus with two rows of windows.",
    "This is cat.",
    "A pine tree keeps its green needles in winter.",
)
SCALE = 0.1

#: Logits of three pictures and five classes.
LOGITS = {
    "mma": [
        [0.35371, 0.37509, 0.83064, 0.23653, 0.0148],
        [-0.09519, -0.10246, 0.48352, -0.12988, -0.17946],
        [-0.3135, -0.00262, 0.59783, -0.09823, -0.38545],
    ],
    "lweib": [
        [0.23982, 0.41353, 0.24291, 0.5737, 0.42887],
        [-0.29209, -0.14465, 0.07238, 0.06156, 0.1928],
        [-0.12302, 0.09941, 0.17454, 0.11299, -0.23514],
    ],
    "mmrl": [
        [4.1571, 5.06413, 2.44937, 3.51044, 4.63907],
        [1.75559, 2.90083, 0.03731, 1.64393, 4.20882],
        [4.12223, 4.70035, 2.92963, 4.08762, 5.23165],
    ],
    "dpl_subnet": [
        [0.13475, 0.11857, 0.97102, 0.09416, -0.17556],
        [-0.23112, -0.26094, 0.64267, -0.16112, -0.27836],
        [-0.53549, -0.2088, 0.56273, -0.24555, -0.51864],
    ],
}
#: Norms of the gradients of the loss; MMA and LwEIB divide those of their weights by the scale.
NORMS = {
    "mma": {
        "adapter_learner.text_adapter.2.down.0.weight": 0.15638029 * SCALE,
        "adapter_learner.visual_adapter.3.up.bias": 0.07823116 * SCALE,
        "adapter_learner.shared_adapter.3.0.weight": 0.15813093 * SCALE,
    },
    "lweib": {
        "adapter_learner.text_adapter.1.att_conv.conv.weight": 0.38426148 * SCALE,
        "adapter_learner.text_adapter.3.mlp_conv.conv.weight": 0.09310033 * SCALE,
        "adapter_learner.visual_adapter.1.mlp_conv.conv.weight": 0.10012082 * SCALE,
        "adapter_learner.visual_adapter.3.att_conv.conv.weight": 0.123999034 * SCALE,
    },
    "dpl_subnet": {
        "prompt_learner.ctx_img_lst.0": 0.7659526,
        "prompt_learner.ctx_img_lst.2": 0.37461425,
        "prompt_learner.ctx_txt_lst.0": 1.08653423,
        "prompt_learner.ctx_txt_lst.1": 0.97316483,
    },
}


@lru_cache(maxsize=1)
def clip() -> CLIP:
    return golden_clip()


class Learned:
    """A case's learned tensors, by the authors' names."""

    def __init__(self, case: str) -> None:
        self.case, self.tensors = case, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = torch.from_numpy(seeded().learned(self.case, name, shape)).requires_grad_()
        return self.tensors[name]


def texts(words: str, **changes: object) -> Tensor:
    tower = clip().text
    return F.normalize(tower(tower.compose_text(words, NAMES), **changes)[0], dim=-1)


def mma(learned: Learned) -> Tensor:
    """Adapters of the last two layers, whose middle both towers share."""

    def adapter(tower: str, width: int, layer: int) -> LayerAction:
        own = f"adapter_learner.{tower}_adapter.{layer}"
        down, into = learned(f"{own}.down.0.weight", 32, width), learned(f"{own}.down.0.bias", 32)
        up, out_of = learned(f"{own}.up.weight", width, 32), learned(f"{own}.up.bias", width)
        shared = f"adapter_learner.shared_adapter.{layer}.0"
        middle, bias = learned(f"{shared}.weight", 32, 32), learned(f"{shared}.bias", 32)
        blocks = clip().text.blocks if tower == "text" else clip().image.layers.blocks
        norm = blocks[layer - 1].ln_1

        def after(x: Tensor, out: Tensor) -> Tensor:
            hidden = F.relu(F.linear(F.relu(F.linear(norm(x), down, into)), middle, bias))
            return out + SCALE * F.linear(hidden, up, out_of)

        return LayerAction(after=after, per_token=True)

    text = texts("a photo of a {}.", actions={i - 1: adapter("text", 512, i) for i in (2, 3)})
    image = clip().encode_image(images(), actions={i - 1: adapter("visual", 768, i) for i in (2, 3)})
    return clip().scale * image @ text.T


def lweib(learned: Learned) -> Tensor:
    """Depthwise convolutions over the positions, or the grid of patches, in front of attention and of the activation."""

    def along(weight: Tensor) -> Callable[[Tensor], Tensor]:
        def convolve(x: Tensor) -> Tensor:
            flat = x.flatten(0, -3).transpose(1, 2)
            return x + SCALE * F.conv1d(flat, weight, padding=1, groups=len(weight)).transpose(1, 2).view_as(x)

        return convolve

    def across(weight: Tensor) -> Callable[[Tensor], Tensor]:
        def convolve(x: Tensor) -> Tensor:
            grid = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            more = F.conv2d(grid, weight, padding=1, groups=len(weight)).flatten(2).transpose(1, 2)
            return torch.cat([x[:, :1], x[:, 1:] + SCALE * more], dim=1)

        return convolve

    def action(tower: str, width: int, layer: int) -> LayerAction:
        own, make, size = f"adapter_learner.{tower}_adapter.{layer}", along, (3,)
        if tower == "visual":
            make, size = across, (3, 3)
        attention = learned(f"{own}.att_conv.conv.weight", width, 1, *size)
        mlp = learned(f"{own}.mlp_conv.conv.weight", 4 * width, 1, *size)
        return LayerAction(normed=make(attention), hidden=make(mlp))

    tower = clip().text
    words = [f"a photo of a {name.replace('_', ' ')}, {text}" for name, text in zip(NAMES, SENTENCES, strict=True)]
    prompts = tower.compose_text("{}", words)
    text = F.normalize(tower(prompts, actions={i - 1: action("text", 512, i) for i in (1, 2, 3)})[0], dim=-1)
    image = clip().encode_image(images(), actions={i - 1: action("visual", 768, i) for i in (1, 2, 3)})
    return clip().scale * image @ text.T


def mmrl(learned: Learned) -> Tensor:
    """Tokens that enter both towers at the second layer, are replaced at the third, and are read in the image tower."""
    tokens, head = learned("representation_learner.compound_rep_tokens", 5, 512), "representation_learner.compound_rep_tokens"

    def steps(kind: str, width: int) -> dict[int, PromptStep]:
        names = [f"{head}_r2{kind}proj.{i}" for i in range(2)]
        new = [F.linear(tokens, learned(f"{name}.weight", width, 512), learned(f"{name}.bias", width)) for name in names]
        return {1: PromptStep(new[0]), 2: PromptStep(new[1], remove=5)}

    text, tower = texts("a photo of a {}, a type of pet.", deep=steps("t", 512)), clip().image
    states = tower.states(images(), steps("v", 768))
    own = tower.norm(states.prompts).mean(dim=1) @ learned("image_encoder.proj_rep", 768, 512)
    both = [F.normalize(part, dim=-1) @ text.T for part in (tower.project(tower.norm(states.first)), own)]
    return 100 * (0.7 * both[0] + 0.3 * both[1])


def dpl_subnet(learned: Learned) -> Tensor:
    """Prompts that are keys and values of one layer alone, as many as a search found for it."""

    def actions(kind: str, width: int, lengths: tuple[int, ...]) -> dict[int, LayerAction]:
        extra = {i: learned(f"prompt_learner.ctx_{kind}_lst.{i}", n, width) for i, n in enumerate(lengths) if n}
        return {i: LayerAction(attention=lambda attend, new=new: attend(new)) for i, new in extra.items()}

    text = texts("a photo of a {}.", actions=actions("txt", 512, (1, 3, 0)))
    return clip().scale * clip().encode_image(images(), actions=actions("img", 768, (2, 0, 3))) @ text.T


@pytest.mark.parametrize("method", [mma, lweib, mmrl, dpl_subnet])
@pytest.mark.parametrize("chunk", [0, 2])
def test_logits_and_gradients_are_the_authors(method, chunk, monkeypatch):
    monkeypatch.setattr(clip().text, "class_chunk", chunk)
    case = method.__name__
    learned = Learned(case)
    logits = method(learned)
    torch.testing.assert_close(logits.detach(), torch.tensor(LOGITS[case]), rtol=1e-4, atol=2e-5)
    F.cross_entropy(logits, labels()).backward()
    for name, norm in NORMS.get(case, {}).items():
        assert learned.tensors[name].grad.norm().item() == pytest.approx(norm, rel=2e-4)
    without = [name for name, tensor in learned.tensors.items() if tensor.grad is None or not tensor.grad.any()]
    # Only the class token is read behind the last layer, and LwEIB's convolution leaves it out.
    assert without == (["adapter_learner.visual_adapter.3.mlp_conv.conv.weight"] if case == "lweib" else [])
