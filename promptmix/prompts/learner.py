"""A mixture of prompts as a composition of the four roles; CoOp is the case of one prompt and no router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix.errors import ConfigError
from promptmix.prompts.roles import Distiller, LossTerms, PromptBank, PromptLearner, Router, Task, TextSupervision


class Mixture(PromptLearner):
    """Bank, router, text supervision and distiller as one learner.

    The score of class c for image b is ``s * <f_b, sum_k w_bk t_{e_bk, c}>``: weights w over the chosen experts e from the
    router, their normalised text features t; the mixed feature is not normalised again (MoCoOp). It is computed as the
    weighted sum of the experts' own scores, which is the same number without a text feature per image.
    Loss = ``ce_weight`` CE + ``router_weight`` router + ``text_weight`` supervision + ``distill_weight`` distiller.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts' prompts.
        router: None weighs all experts equally.
        supervision: None adds no text loss.
        distiller: None adds no distillation.
        ce_weight: factor on the cross-entropy.
        router_weight: factor on the router's loss.
        text_weight: factor on the text supervision.
        distill_weight: factor on the distiller's loss.

    Raises:
        ConfigError: the prompts differ from image to image, but the supervision takes one set of text features.
    """

    def __init__(
        self,
        task: Task,
        bank: PromptBank,
        router: Router | None = None,
        supervision: TextSupervision | None = None,
        distiller: Distiller | None = None,
        *,
        ce_weight: float = 1.0,
        router_weight: float = 1.0,
        text_weight: float = 1.0,
        distill_weight: float = 1.0,
    ) -> None:
        super().__init__(task)
        if bank.per_image and supervision is not None and not supervision.takes_per_image:
            raise ConfigError(
                f"TEXT_SUPERVISION.NAME {type(supervision).__name__} takes one set of text features, but the prompts of "
                f"{type(bank).__name__} differ from image to image; choose another of the two"
            )
        self.bank, self.router, self.supervision, self.distiller = bank, router, supervision, distiller
        self.class_specific = bank.class_specific
        self.ce_weight, self.router_weight = ce_weight, router_weight
        self.text_weight, self.distill_weight = text_weight, distill_weight

    def classifier(self) -> Tensor | Sequence[str]:
        """Return text features (E, C, D), or the class names where prompts depend on the image."""
        return self.task.classnames if self.bank.per_image else self.bank(self.task.classnames)

    def logits(self, image_features: Tensor, classifier: Tensor | Sequence[str]) -> Tensor:
        """Return scores (B, C) from image features (B, D) and what ``classifier`` returned."""
        weights = None if self.router is None else self.router(image_features).dense
        return self._mix(image_features, self._text(image_features, classifier), weights)

    def loss(self, image_features: Tensor, labels: Tensor) -> LossTerms:
        """Return the weighted sum of the roles' losses for a batch."""
        routing = None if self.router is None else self.router(image_features)
        weights = None if routing is None else routing.dense
        if self._skips_experts and routing is not None and weights is not None:
            used = routing.experts.unique()
            text, weights = self.bank(self.task.classnames, experts=used), weights[:, used]
        else:
            text = self._text(image_features, self.classifier())
        logits = self._mix(image_features, text, weights)
        terms: dict[str, tuple[float, Tensor | None]] = {"ce": (self.ce_weight, F.cross_entropy(logits, labels))}
        if self.router is not None and routing is not None:
            terms["router"] = (self.router_weight, self.router.loss(routing, image_features, labels))
        if self.supervision is not None:
            terms["text"] = (self.text_weight, self.supervision(self.bank, text))
        if self.distiller is not None:
            terms["distill"] = (self.distill_weight, self.distiller(image_features, logits, labels))
        present = {name: (weight, value) for name, (weight, value) in terms.items() if value is not None}
        total = torch.stack([weight * value for weight, value in present.values()]).sum()
        return LossTerms(total, {name: value for name, (_, value) in present.items()} if len(present) > 1 else {}, logits)

    @property
    def _skips_experts(self) -> bool:
        """Whether experts that no image chose can be left out: no loss looks at their features (and there are numbers at all)."""
        possible = self.bank.takes_experts and self.supervision is None and not self.clip.scale.is_meta
        return self.sparse_experts and possible

    def _text(self, image_features: Tensor, classifier: Tensor | Sequence[str]) -> Tensor:
        return classifier if isinstance(classifier, Tensor) else self.bank(classifier, image_features)

    def _mix(self, image_features: Tensor, text: Tensor, weights: Tensor | None) -> Tensor:
        """Scores (B, C) from features (B, D), text (E, C, D) or (B, E, C, D) and weights (B, E), None for equal ones."""
        equation = "bd,becd->bec" if text.dim() == 4 else "bd,ecd->bec"
        scores = torch.einsum(equation, image_features, text.to(image_features.dtype))
        if weights is None:
            return self.clip.scale * scores.mean(dim=1)
        return self.clip.scale * torch.einsum("be,bec->bc", weights.to(scores.dtype), scores)
