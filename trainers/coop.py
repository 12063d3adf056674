"""CoOp: Learning to Prompt for Vision-Language Models.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu. IJCV 2022. https://arxiv.org/abs/2109.01134

| paper | here |
|---|---|
| [V]_1 ... [V]_M | ``Soft.ctx`` (1, M, W), or (1, C, M, W) class-specific |
| g(t_i) | ``TextTower`` on ``[SOT] ctx name . [EOT]`` |
| tau | 1 / ``CLIP.scale`` |

Deviations from the authors' code: none in the numbers (``tests/golden`` holds theirs). Prompts run in the trainer's precision,
fp32 by default, where the authors use fp16 weights.
"""

from __future__ import annotations

from yacs.config import CfgNode

from promptmix import hookimpl
from promptmix.components import PromptLearner, Task
from promptmix.config import source_of
from promptmix.errors import ConfigError
from promptmix.mixture import Mixture
from promptmix.prompting import PromptTrainer
from promptmix.registry import PROMPT_BANK_REGISTRY, Registry


class CoOp(PromptTrainer):
    """One soft prompt, trained with cross-entropy."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare CoOp's keys, as the authors name them."""
        node.N_CTX = 16  # M: context vectors
        node.CSC = False  # class-specific contexts: one context per class
        node.CTX_INIT = ""  # words to start from, such as "a photo of a"; then M is their number of tokens
        node.CLASS_TOKEN_POSITION = "end"  # end | middle | front

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a context length that the initial words would override."""
        node = cfg.TRAINER.COOP
        if node.CTX_INIT and source_of(cfg, "TRAINER.COOP.N_CTX") == "command line":
            raise ConfigError(
                f"TRAINER.COOP.N_CTX {node.N_CTX} would be ignored, since CTX_INIT {node.CTX_INIT!r} sets the length; drop one"
            )

    def build_learner(self, task: Task) -> PromptLearner:
        """Return one soft prompt without router, supervision or distiller."""
        node = self.node
        bank = PROMPT_BANK_REGISTRY.get("Soft")(
            task,
            n_ctx=node.N_CTX,
            ctx_init=node.CTX_INIT,
            csc=node.CSC,
            class_token_position=node.CLASS_TOKEN_POSITION,
        )
        return Mixture(task, bank)


@hookimpl
def register_trainers(registry: Registry) -> None:
    """Add the trainer."""
    registry.register(CoOp)
