"""DPL: Differentiable Prompt Learning for Vision Language Models.

Zhenhan Huang, Tejaswini Pedapati, Pin-Yu Chen, Jianxi Gao. IJCAI 2025. https://arxiv.org/abs/2501.00457

| paper | here |
|---|---|
| deep continuous prompts of layer l: keys and values beside the layer's tokens | ``Memory``, in both towers |
| supernet: a prompt of each length 0 ... N in each layer, mixed by softmax(alpha_l) | ``Choices``, ``N_CTX_VISION``, ``_TEXT`` |
| alpha learns on validation, prompts on training batches, in turn | ``DPLSearch`` (``BilevelTrainer``), Adam with ``ALPHA_LR`` |
| lengths: argmax of each row of alpha | ``Choices.lengths``, ``lengths.json`` in the search's folder |
| training anew with these lengths | ``DPL``, ``SEARCH`` (that folder), or ``LENGTHS_VISION`` and ``LENGTHS_TEXT`` |
| L_ce + lambda KL(zero-shot, student), released with lambda 0 | ``DPL.compose``, ``KL_WEIGHT`` |

What the tokens of a layer give each other is computed once for all lengths, where the authors run N + 1 attentions; the text
tower stays prefix-shared, since all classes see the same prompts.

As in the authors' code (github.com/Zhenhan-Huang/Differentiable-Prompt-Learn), CTX_INIT ``ensemble`` averages the token
embeddings of 60 templates position by position, padding included, and reads the feature at the last one's EOT; the KL's zero-shot
teacher is the last template alone. ``features`` is ours: the mean of the templates' text features, each encoded with the prompts.
Deviations: validation batches take turns, where the authors see the first one in each step; alpha is in the checkpoint; lengths
are written with the towers' names, which the authors' two files have swapped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from promptmix.plugins.distillation.zeroshot_kl import ZeroshotKL
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix import register
from promptmix.clip import LayerAction, Memory, Prompts
from promptmix.config import source_of
from promptmix.config.declare import Setting
from promptmix.data.templates import IMAGENET_60
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import ConfigError, DataError, SettingError
from promptmix.parallel import group
from promptmix.prompts.bilevel import BilevelTrainer
from promptmix.prompts.deep import STD, check_depth
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Component, PromptBank, Task
from promptmix.prompts.trainer import PromptTrainer
from promptmix.utils import get_logger, read_json, write_json

#: CTX_INIT ``custom`` by data set; others take the data set's first template.
CUSTOM = {
    "OxfordPets": "a type of pet, a photo of a {}.",
    "OxfordFlowers": "a type of flower, a photo of a {}.",
    "FGVCAircraft": "a type of aircraft, a photo of a {}.",
    "DescribableTextures": "a texture of {}.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a type of food, a photo of {}.",
    "UCF101": "a photo of a person doing {}.",
    **dict.fromkeys(("StanfordCars", "SUN397", "Caltech101", "ImageNet"), "a photo of a {}."),
    **dict.fromkeys(("ImageNetSketch", "ImageNetV2", "ImageNetA", "ImageNetR"), "a photo of a {}."),
}
LENGTHS_FILE = "lengths.json"


class LayerMemories(Component):
    """What one tower's layers see beside their tokens."""

    @abstractmethod
    def memories(self) -> list[Memory]:
        """Return the memory of each layer."""

    def actions(self) -> dict[int, LayerAction]:
        """Return the actions of the tower's layers that have one."""
        return {i: LayerAction(memory=memory) for i, memory in enumerate(self.memories()) if memory.tokens.shape[0]}


class Choices(LayerMemories):
    """In each layer a prompt of each length 1 ... N, mixed with none by softmax(alpha).

    Args:
        width: W of the tower.
        depth: its layers.
        longest: N.
        uniform: prompts start uniform in [0, 1) (text), otherwise normal (image).
    """

    def __init__(self, width: int, depth: int, longest: int, *, uniform: bool) -> None:
        super().__init__()
        self.sizes = tuple(range(longest + 1))
        draw = torch.rand if uniform else torch.randn
        lengths = self.sizes[1:]
        self.prompts = nn.ModuleList(
            nn.ParameterList([nn.Parameter(draw(length, width)) for length in lengths]) for _ in range(depth)
        )
        self.alpha = nn.Parameter(1e-3 * torch.randn(depth, longest + 1))

    def memories(self) -> list[Memory]:
        """Return the mixed choice of each layer."""
        shares = self.alpha.softmax(dim=-1)
        return [Memory(torch.cat(list(own.parameters())), self.sizes, row) for own, row in zip(self.prompts, shares, strict=True)]

    def lengths(self) -> list[int]:
        """Return the preferred length of each layer."""
        found: list[int] = self.alpha.argmax(dim=-1).tolist()
        return found


class Chosen(LayerMemories):
    """A prompt of a given length in each layer; 0 for none. A checkpoint decides the lengths when it is loaded.

    Args:
        width: W of the tower.
        lengths: of each layer.
    """

    def __init__(self, width: int, lengths: Sequence[int]) -> None:
        super().__init__()
        for layer, length in enumerate(lengths):
            self.register_parameter(str(layer), nn.Parameter(torch.empty(length, width).normal_(std=STD)))
        self.sized_by_data = tuple(self._parameters)  # type: ignore[misc]  # the class has one for all of its kind

    def memories(self) -> list[Memory]:
        """Return the prompt of each layer."""
        return [Memory(prompt, (len(prompt),)) for prompt in self.parameters()]


class KeyPrompts(PromptBank):
    """Frozen words in front of towers whose layers see prompts as keys and values.

    Args:
        text: the prompts of the text tower.
        image: the prompts of the image tower.
        templates: the words; several are averaged.
        tokens: average token embeddings; otherwise text features.
    """

    def __init__(
        self, task: Task, text: LayerMemories, image: LayerMemories, templates: Sequence[str], *, tokens: bool = False
    ) -> None:
        super().__init__(task)
        self.text, self.image = text, image
        self.templates, self.tokens = tuple(templates), tokens

    def image_changes(self) -> dict[str, Any]:
        return {"actions": self.image.actions()}

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        tower, actions = self.task.clip.text, self.text.actions()
        if self.tokens:
            words = self.once("words", names, lambda: averaged(self.task, self.templates, names))
            return F.normalize(tower(words, actions=actions), dim=-1)
        each = [F.normalize(tower(tower.compose_text(words, names), actions=actions), dim=-1) for words in self.templates]
        return each[0] if len(each) == 1 else F.normalize(torch.stack(each).mean(dim=0), dim=-1)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the frozen features (1, C, D) of the words."""
        return self.task.clip.ensemble(self.templates, names)[None]


@torch.inference_mode(False)  # what an evaluation makes serves steps that learn too
@torch.no_grad()
def averaged(task: Task, templates: Sequence[str], names: Sequence[str]) -> Prompts:
    """Return prompts whose token embeddings are the mean over templates at each position, padding included.

    They end where the last template has its EOT, so that one with more tokens before the name is cut, and one with fewer padded.

    Raises:
        ConfigError: a prompt is longer than the tower reads.
    """
    tower, tokenizer = task.clip.text, task.clip.tokenizer
    rows = [
        [[*tokenizer.before, *tokenizer.encode(words.format(name.replace("_", " "))), *tokenizer.after] for name in names]
        for words in templates
    ]
    longest = max(len(row) for some in rows for row in some)
    if longest > tower.context_length:
        raise ConfigError(f"the longest prompt has {longest} tokens, but this backbone reads {tower.context_length}")
    ends = [len(row) for row in rows[-1]]
    size = max(ends)
    ids = torch.tensor([[(row + [tokenizer.pad] * size)[:size] for row in some] for some in rows])  # (P, C, L)
    mean = torch.zeros(len(names), size, tower.width, device=task.clip.scale.device)
    for some in ids:
        mean = mean + tower.token_embedding(some.to(mean.device)) / len(ids)
    same = (ids == ids[:, :1]).all(dim=1).all(dim=0)
    shared = min(int(same.cumprod(dim=0).sum()), min(ends) - 1)
    tail = torch.cat([row[shared:end] for row, end in zip(mean, ends, strict=True)])
    return Prompts(mean[None, 0, :shared], tail[None], tuple(end - shared for end in ends))


@register
class DPLSearch(BilevelTrainer):
    """The search: which length of prompt each layer wants."""

    def compose(
        self,
        task: Task,
        n_ctx_vision: Annotated[int, Setting("N of the image tower: longest prompt of a layer", low=1)] = 6,
        n_ctx_text: Annotated[int, Setting("N of the text tower: longest prompt of a layer", low=1)] = 6,
        ctx_init: Annotated[str, Setting("frozen words in front of the class name")] = "a photo of a",
        alpha_lr: Annotated[float, Setting("learning rate of alpha, by Adam; it stays", low=0)] = 0.0035,
    ) -> Learner:
        clip = task.clip
        check_depth(clip, "n_ctx_vision", 1, vision=True)
        image = Choices(clip.image.width, clip.image.depth, n_ctx_vision, uniform=False)
        text = Choices(clip.text.width, len(clip.text.blocks), n_ctx_text, uniform=True)
        bank = KeyPrompts(task, text, image, [f"{ctx_init.replace('_', ' ')} {{}}.".lstrip()])
        return Learner(task, bank, head=Cosine(task, bank))

    def outer_parameters(self, model: PromptLearner) -> list[nn.Parameter]:
        """Return alpha of both towers."""
        bank: Any = model.bank
        return [bank.image.alpha, bank.text.alpha]

    def build_outer_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return Adam as the authors have it."""
        return torch.optim.Adam(parameters, lr=self.node.ALPHA_LR, betas=(0.5, 0.999))

    def after_epoch(self) -> None:
        """Write the lengths as they are now."""
        super().after_epoch()
        bank: Any = self.model.bank
        lengths = {"vision": bank.image.lengths(), "text": bank.text.lengths()}
        get_logger().info("Lengths: vision %s, text %s", lengths["vision"], lengths["text"])
        if group.writes():
            write_json({**lengths, "epoch": self.epoch + 1}, Path(self.output_dir, LENGTHS_FILE))


@register
class DPL(PromptTrainer):
    """The training: prompts of found or given lengths, with cross-entropy."""

    layout = Layout(
        "MultiModalPromptLearner",
        (Rule("ctx_img_lst.{i}", "bank.image.{i}"), Rule("ctx_txt_lst.{i}", "bank.text.{i}")),
        whole=True,
        unused=(r"ZS_image\..*",),
    )

    def compose(
        self,
        task: Task,
        search: Annotated[str, Setting("folder of a DPLSearch run whose lengths are taken; '' = LENGTHS_*", place=True)] = "",
        lengths_vision: Annotated[
            Sequence[int], Setting("prompt vectors of each layer of the image tower; one number serves all", low=0)
        ] = (4,),
        lengths_text: Annotated[
            Sequence[int], Setting("prompt vectors of each layer of the text tower; one number serves all", low=0)
        ] = (4,),
        ctx_init: Annotated[
            str,
            Setting(
                "frozen words: 'a photo of a', the data set's own, or 60 templates whose tokens or features are averaged",
                choices=("default", "custom", "ensemble", "features"),
            ),
        ] = "ensemble",
        kl_weight: Annotated[float, Setting("factor on the divergence from the zero-shot model", low=0)] = 0.0,
    ) -> Learner:
        """Return the prompts with the loss L_ce + KL_WEIGHT KL."""
        clip = task.clip
        check_depth(clip, "lengths_vision", 1, vision=True)
        depths = {"vision": clip.image.depth, "text": len(clip.text.blocks)}
        found = read_lengths(Path(search), depths) if search else {}
        given = {
            tower: found.get(tower) or spread(f"lengths_{tower}", lengths, depths[tower])
            for tower, lengths in (("vision", lengths_vision), ("text", lengths_text))
        }
        image, text = Chosen(clip.image.width, given["vision"]), Chosen(clip.text.width, given["text"])
        custom = CUSTOM.get(self.cfg.DATASET.NAME, task.templates[0])
        words = {"default": ("a photo of a {}.",), "custom": (custom,)}.get(ctx_init, IMAGENET_60)
        bank = KeyPrompts(task, text, image, words, tokens=ctx_init == "ensemble")
        teacher = ZeroshotKL(task, bank, IMAGENET_60[-1:], over_classes=True) if kl_weight else None
        return Learner(
            task, bank, head=Cosine(task, bank), loss=CrossEntropy() + kl_weight * teacher if teacher else CrossEntropy()
        )

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse lengths that those of a search would override."""
        super().validate(cfg)
        for key in ("TRAINER.DPL.LENGTHS_VISION", "TRAINER.DPL.LENGTHS_TEXT"):
            if cfg.TRAINER.DPL.SEARCH and (source := source_of(cfg, key)):
                raise ConfigError(f"{key} (set by {source}) would be ignored, since TRAINER.DPL.SEARCH gives lengths; drop one")


def spread(setting: str, lengths: Sequence[int], depth: int) -> list[int]:
    """Return the length of each layer; one number serves all."""
    if len(lengths) not in (1, depth):
        raise SettingError(setting, list(lengths), f"but the tower has {depth} layers; give {depth} numbers, or one for all")
    return list(lengths) * (depth if len(lengths) == 1 else 1)


def read_lengths(folder: Path, depths: dict[str, int]) -> dict[str, list[int]]:
    """Return the lengths of each tower that a search left in ``folder``.

    Raises:
        DataError: there are none, or they are of towers with other depths.
    """
    path = folder / LENGTHS_FILE
    if not path.is_file():
        raise DataError(f"TRAINER.DPL.SEARCH: no {path}; name the output folder of a run of DPLSearch")
    found = read_json(path)
    for tower, depth in depths.items():
        lengths = found.get(tower) if isinstance(found, dict) else None
        if not isinstance(lengths, list) or len(lengths) != depth or not all(type(n) is int and 0 <= n < 1000 for n in lengths):
            raise DataError(f"TRAINER.DPL.SEARCH: {path} gives no {depth} lengths for {tower}; search with this backbone")
    return {tower: found[tower] for tower in depths}
