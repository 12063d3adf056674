"""CoCoOp: Conditional Prompt Learning for Vision-Language Models.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu. CVPR 2022. https://arxiv.org/abs/2203.05557

| paper | here |
|---|---|
| v_1 ... v_M | ``InstanceConditional.ctx`` (1, M, W) |
| h_theta, the meta-net | ``InstanceConditional.meta_net``: Linear(D, D/16), ReLU, Linear(D/16, W) |
| v_m(x) = v_m + h_theta(x) | ``InstanceConditional._encode``, one context per image |
| p(y given x), equation 3 | ``Mixture.logits`` with text features per image (B, 1, C, D) |

Deviations from the authors' code: none in the numbers. Theirs encodes 77 positions per image and class, one image after the
other, and so trains with batch 1; here all images of a batch share one pass in which only class names are computed per class.
"""

from __future__ import annotations

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.prompts.context import validate_context
from promptmix.prompts.learner import Mixture
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.prompts.trainer import PromptTrainer
from promptmix.registry import PROMPT_BANK_REGISTRY, Registry


class CoCoOp(PromptTrainer):
    """One soft prompt that a small network shifts for each image, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare CoCoOp's keys, as the authors name them, and two of ours."""
        node.N_CTX = 4  # M: context vectors
        node.CTX_INIT = "a photo of a"  # words to start from; then M is their number of tokens. "" starts at random
        node.REDUCTION = 16  # ours: joint width D over the meta-net's hidden width
        node.IMAGE_CHUNK = 16  # ours: images encoded together in evaluation; less needs less memory

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a context length that the initial words would override."""
        validate_context(cfg, "TRAINER.COCOOP")

    def build_learner(self, task: Task) -> PromptLearner:
        """Return one instance-conditional prompt without router, supervision or distiller."""
        node = self.node
        bank = PROMPT_BANK_REGISTRY.get("InstanceConditional")(
            task, n_ctx=node.N_CTX, ctx_init=node.CTX_INIT, reduction=node.REDUCTION, image_chunk=node.IMAGE_CHUNK
        )
        return Mixture(task, bank)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(CoCoOp)
