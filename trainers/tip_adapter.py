"""Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, and Tip-Adapter-F, which learns its keys on.

Renrui Zhang, Wei Zhang, Rongyao Fang, Peng Gao, Kunchang Li, Jifeng Dai, Yu Qiao, Hongsheng Li. ECCV 2022.
https://arxiv.org/abs/2207.09519

| paper | here |
|---|---|
| F_train, keys: means over 10 augmented views, normalised | ``Cache.keys`` (N, D), learned in ``TipAdapterF`` |
| L_train, values | ``Cache.values`` (N, C), one-hot |
| phi(x) = exp(-beta (1 - x)) | ``votes_of`` |
| alpha phi(f F_train^T) L_train + f W_c^T | ``Cache.forward``; f W_c^T times 100 |
| alpha, beta | ``ALPHA``, ``BETA``; searched on the val part after training where ``SEARCH_SCALE`` is given |

The authors' code swaps the paper's letters; here they are the code's. Text: the mean of ``TEMPLATES``.

Deviations from the authors' code: Tip-Adapter-F keeps the last epoch (theirs keeps the one that tests best); the search sees the
val part of the protocol, few-shot as CoOp's (theirs the whole val part, on ImageNet the test pictures). Their checkpoint is the
bare tensor of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from promptmix.plugins.heads.cache import Cache, search
from promptmix.plugins.prompt_bank.hard import Hard
from yacs.config import CfgNode

from promptmix import register
from promptmix.config.declare import Setting, inherits
from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Task
from promptmix.prompts.trainer import PromptTrainer
from promptmix.utils import get_logger


@register
class TipAdapter(PromptTrainer):
    """A cache of the training pictures beside the hard classifier; nothing is learned."""

    learns_keys: ClassVar[bool] = False
    schedule_unit = "step"

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Refuse a search beside a choice of epochs, and one without the ends of both grids."""
        super().validate(cfg)
        node, name = cfg.TRAINER[cls.__name__.upper()], f"TRAINER.{cls.__name__.upper()}"
        if len(node.SEARCH_SCALE) not in (0, 2):
            raise ConfigError(f"{name}.SEARCH_SCALE is {list(node.SEARCH_SCALE)}, but must be () or the ends of beta and alpha")
        if len(node.SEARCH_SCALE) and cfg.TEST.FINAL_MODEL == "best_val":
            raise ConfigError(
                f"{name}.SEARCH_SCALE searches on the val part after the last epoch, and TEST.FINAL_MODEL 'best_val' would take "
                "another; leave one of the two out"
            )

    @inherits(Cache, without=["learned"])
    def compose(
        self,
        task: Task,
        search_scale: Annotated[Sequence[float], Setting("ends of the search for beta and alpha; () = none", above=0.1)] = (),
        search_step: Annotated[Sequence[int], Setting("points of either search", low=1, length=2)] = (200, 20),
        templates: Annotated[Sequence[str], Setting("hard templates that are averaged; () = the data set's first")] = (),
        **cache: Any,
    ) -> Learner:
        self.search_scale, self.search_step = search_scale, search_step
        prompts = Hard(task, templates)
        return Learner(task, prompts, head=Cache(task, prompts, learned=self.learns_keys, **cache))

    def before_train(self) -> None:
        """Fill the cache.

        Raises:
            ConfigError: alpha and beta are to be searched, but there is no val part.
        """
        if len(self.search_scale) and self.val_loader is None:
            raise ConfigError(
                f"TRAINER.{self.cfg.TRAINER.NAME.upper()}.SEARCH_SCALE needs val pictures, which {self.cfg.DATASET.NAME} lacks "
                "here; leave it out"
            )
        super().before_train()

    def after_epoch(self) -> None:
        """Search alpha and beta after the last epoch, before its checkpoint is written."""
        if self.epoch + 1 == self.max_epoch and len(self.search_scale):
            self._search()
        super().after_epoch()

    @torch.no_grad()
    def _search(self) -> None:
        head: Any = self.model.head  # of compose
        self.set_model_mode("eval")
        cosines, text, labels = [], [], []
        with self.precision.autocast():
            for batch in self.val_loader or ():
                images, target = self.parse_batch_test(batch)
                step = self.model.step(images)
                cosines.append((step.image @ head.keys.to(step.image.dtype).T).float())
                text.append(head.parts(step)[0].float())
                labels.append(target)
        on_val = torch.cat(cosines), torch.cat(text), head.values, torch.cat(labels)
        beta, alpha = search(*on_val, self.search_scale, self.search_step)
        head.beta.fill_(beta)
        head.alpha.fill_(alpha)
        get_logger().info("Found on the val part: beta %.3f, alpha %.3f", beta, alpha)


@register
class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are learned with cross-entropy."""

    learns_keys = True
