"""HiCroPL: Hierarchical Cross-modal Prompt Learning for Vision-Language Models.

Hao Zheng, Shunzhi Yang, Zhuoxin He, Jinfeng Yang, Zhenhua Huang. ICCV 2025. https://arxiv.org/abs/2507.14976

| paper | here |
|---|---|
| P_t, P_v: prompts of the first layers of both towers | ``Hierarchical.text``, ``.vision``; ``N_CTX``, ``PROMPT_DEPTH`` |
| layer-specific knowledge proxies (LKP) | ``Pooling``: a proxy token asks one layer's prompts; ``text_proxy``, ``visual_proxy`` |
| multi-scale knowledge mapper | ``Mapper``: prompts of several layers ask all pooled vectors; ``to_visual``, ``to_text`` |
| early layers: text to image, later ones: image to text | layers 1 to ``CROSS_LAYER``, and from there to ``PROMPT_DEPTH`` |
| frozen features added to learned ones | ``Hierarchical.join`` (image), ``.forward`` (text: the mean over a class's sentences) |
| L = L_ce + lambda (L_text + L_image) | ``CosineToHard`` + ``FrozenImageCosine``, ``LAMBD`` |

Which HiCroPL? In the authors' code (github.com/zzeoZheng/HiCroPL, trainers/hicropl.py) the mapped prompts are copied into the
prompts' data outside of the graph. So mappers, poolings and proxies never learn, every pass overwrites prompts, evaluation too,
and scores depend on how many batches were seen before. ``MAPPING: written`` is that, number for number, and what the published
averages were measured with. The default, ``MAPPING: learned``, is what the paper describes: gradients reach the mappers, and
nothing but training changes a weight. It is the default because what the other says of a picture depends on the pictures before
it; no number was published for it. ``written`` encodes the class names anew with every batch, ``learned`` once an evaluation.

Sentences are part of the classifier: new class names need some too. The mapped prompts are shared by all classes, so that the
text tower stays prefix-shared.

Other deviations: heads and widths follow the model; poolings, proxies and image prompts start as theirs, equal in all layers;
more tokens than CTX_INIT has are refused, where theirs ignores CTX_INIT (their 16 tokens go with ""); sentence features are not
rounded to fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from promptmix.plugins.distillation.frozen_image import FrozenImageCosine
from promptmix.plugins.prompt_bank.hierarchical import Hierarchical
from promptmix.plugins.text_supervision.hard_prompts import CosineToHard
from torch import Tensor

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.engine.layout import Layout, Rule, linear
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.losses import CrossEntropy
from promptmix.prompts.roles import Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class Rewriting(Learner):
    """A learner whose prompts are overwritten before each pass over pictures: the published behaviour."""

    bank: Hierarchical

    def encode_images(self, images: Tensor) -> Tensor:
        """Overwrite the prompts, then return the features of a frozen and a prompted tower (B, 2, D)."""
        self.bank.write()
        return super().encode_images(images)

    def step(self, images: Tensor, labels: Tensor | None = None) -> Step:
        """Return the step of a batch; its pictures are encoded at once, so that the text tower sees the same prompts."""
        step = super().step(images, labels)
        _ = step.features
        return step

    def classifier(self) -> None:
        """Return nothing: class names are encoded anew for each batch."""


ATTENTION = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias")
NORMS = tuple(f"{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias"))


def _rules(theirs: str, ours: str, names: Sequence[str]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{theirs}.{name}", f"{ours}.{name}") for name in names)


@register
class HiCroPL(PromptTrainer):
    """Deep prompts of both towers that change each other, with frozen features added to both."""

    layout = Layout(
        "VLPromptLearner",
        (
            Rule("ctx", "bank.text.ctx"),
            Rule("cross_prompts_text.0", "bank.text.ctx"),  # the same tensor under a second name
            Rule("cross_prompts_text.{i}", "bank.text.deeper.{i-1}"),
            Rule("cross_prompts_visual.{i}", "bank.vision.layers.{i}"),
            *(
                rule
                for theirs, ours in (("text2visual_net", "bank.to_visual"), ("visual2text_net", "bank.to_text"))
                for rule in (
                    *_rules(theirs, ours, (*ATTENTION, *NORMS)),
                    *(r for part in ("linear_q", "linear_k", "linear_v") for r in linear(f"{theirs}.{part}", f"{ours}.{part}")),
                    *(r for part in ("ffn.c_fc", "ffn.c_proj") for r in linear(f"{theirs}.{part}", f"{ours}.{part}")),
                )
            ),
            *(
                rule
                for kind in ("text", "visual")
                for rule in (
                    *_rules(f"attn_pooling_{kind}_nets.{{i}}", f"bank.{kind}_pooling.{{i}}", (*ATTENTION, *NORMS)),
                    Rule(f"{kind}_proxy_token.{{i}}", f"bank.{kind}_proxy.{{i}}"),
                )
            ),
        ),
        whole=True,
        unused=(r"ZS_image_encoder\..*",),
    )

    @inherits(Hierarchical)
    def compose(
        self,
        task: Task,
        lambd: Annotated[float, Setting("lambda: factor on both distances to frozen features", low=0)] = 12.0,
        **prompts: Any,
    ) -> Learner:
        """Return the prompts with the loss L_ce + lambda (L_text + L_image)."""
        bank = Hierarchical(task, **prompts)
        loss = CrossEntropy() + lambd * (CosineToHard(task, bank) + FrozenImageCosine(task, bank).named("image"))
        kind = Rewriting if bank.written else Learner
        return kind(task, bank, head=Cosine(task, bank), loss=loss)
