"""GalLoP: Learning Global and Local Prompts for Vision-Language Models.

Marc Lafon, Elias Ramzi, Clément Rambour, Nicolas Audebert, Nicolas Thome. ECCV 2024. https://arxiv.org/abs/2407.01400

| paper | here |
|---|---|
| global prompts, local prompts | ``GlobalLocal.global_prompt`` (N_g, M, W), ``GlobalLocal.local_prompts`` (N_l, M, W) |
| z_l, local features without attention in the last layer | ``Step.unprojected_tokens`` (B, P, W_v) |
| h_theta, linear projection of local features, starts as identity | ``SparseLocal.local_proj`` |
| sim_top-k, mean of the k best patches of a class | ``SparseLocal.similarities`` |
| multiscale: k grows from prompt to prompt | ``TOPK`` |
| prompt dropout: each picture sees some of the global prompts | ``KeptGlobal``, ``DROPOUT`` |
| L = L_global + L_local | ``KeptGlobal``, ``EachLocal`` |

Classes are scored by the mean of the global and the local similarity. Both towers are frozen, so features are cacheable.

Deviations from the authors' code (github.com/MarcLafon/gallop): class names are read with spaces for underscores, where theirs
takes them as given. On ResNets h_theta acts in the joint space, and prompts are drawn with replacement, as in theirs. Scores for
out-of-distribution pictures (GL-MCM) are left out, since nothing here tests with pictures of no class. Their checkpoint is one
file; as ``GalLoP/model-best.pth.tar`` in a folder its names are understood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.clip.projection import last_map, map_last
from promptmix.config.declare import Setting
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import SettingError
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Head, Loss, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class GlobalLocal(PromptBank):
    """Global prompts and local prompts ``[V]_1 ... [V]_M [CLASS]`` without a full stop; all start from the same words.

    Args:
        n_global: N_g.
        n_local: N_l.
        ctx_init: words to start from; M is their number of tokens.
    """

    def __init__(self, task: Task, n_global: int, n_local: int, ctx_init: str) -> None:
        super().__init__(task)
        tower = task.clip.text
        start = tower.embed(tower.tokenizer.encode(ctx_init))
        if not len(start):
            raise SettingError("ctx_init", ctx_init, "but has no tokens to start from; give words such as 'A photo of a'")
        self.global_prompt = nn.Parameter(start.repeat(n_global, 1, 1))
        self.local_prompts = nn.Parameter(start.repeat(n_local, 1, 1))

    @property
    def num_experts(self) -> int:
        return len(self.global_prompt) + len(self.local_prompts)

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        """Return text features (N_g + N_l, C, D), those of global prompts first."""
        tower = self.task.clip.text
        context = torch.cat([self.global_prompt, self.local_prompts])
        return tower(tower.compose(context, tower.tokenizer.class_tokens(names), self.stop(full_stop or False)))


class SparseLocal(Head):
    """``s/2 * (mean_i <z, t_i> + mean_j top-k_j mean of <h(z_l), t_j>)``.

    Args:
        bank: its prompts.
        topk: k_j of each local prompt, or one for all; no more than there are patches count.
    """

    needs_tokens = True
    token_kind = "values"

    def __init__(self, task: Task, bank: GlobalLocal, topk: Sequence[int]) -> None:
        super().__init__()
        self.n_global, n_local = len(bank.global_prompt), len(bank.local_prompts)
        if len(topk) not in (1, n_local):
            raise SettingError("topk", tuple(topk), f"but there are {n_local} local prompts; give one number, or one for each")
        self.topk = tuple(topk) if len(topk) == n_local else tuple(topk) * n_local
        # In front of the map into the joint space where the tower's tokens have it there, behind it on a ResNet.
        self.image_level = "unprojected" if task.clip.image.takes_prompts else "raw"
        width = last_map(task.clip.image)[0].shape[0] if self.image_level == "unprojected" else task.clip.embed_dim
        self.local_proj = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.local_proj.weight)

    def forward(self, step: Step) -> Tensor:
        whole, local = step.once(self.similarities)
        return step.task.clip.scale * (whole.mean(dim=-1) + local.mean(dim=-1)) / 2

    def similarities(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return cosines with global prompts (B, C, N_g), and means of the k best patches' with local ones (B, C, N_l)."""
        text = step.text.to(step.image.dtype)
        whole = torch.einsum("bd,ncd->bcn", step.image, text[: self.n_global])
        patches = self.patches(step).to(text.dtype)
        local = [
            (patches @ row.T).topk(min(k, patches.shape[1]), dim=1).values.mean(dim=1)
            for k, row in zip(self.topk, text[self.n_global :], strict=True)
        ]
        return whole, torch.stack(local, dim=-1)

    def patches(self, step: Step) -> Tensor:
        """Return the local features (B, P, D), projected and normalised."""
        if self.image_level == "raw":
            return F.normalize(self.local_proj(step.raw_tokens), dim=-1)
        return F.normalize(map_last(step.task.clip.image, self.local_proj(step.unprojected_tokens)), dim=-1)


class KeptGlobal(Loss):
    """Cross-entropy of the mean over the max(N_g - int(p N_g), 1) global prompts that a picture keeps, drawn with replacement."""

    part = "global"

    def __init__(self, head: SparseLocal, dropout: float) -> None:
        super().__init__()
        self.similarities, self.n_global = head.similarities, head.n_global
        self.kept = max(head.n_global - int(dropout * head.n_global), 1)

    def draw(self, pictures: int, device: torch.device) -> Tensor:
        """Return the indices (B, kept) of each picture's prompts."""
        return torch.randint(self.n_global, (pictures, self.kept), device=device)

    def forward(self, step: Step) -> Tensor:
        whole, _ = step.once(self.similarities)
        index = self.draw(len(whole), whole.device)[:, None].expand(-1, whole.shape[1], -1)
        return F.cross_entropy(step.task.clip.scale * whole.gather(2, index).mean(dim=-1), step.labels)


class EachLocal(Loss):
    """Cross-entropy of each local prompt, averaged over pictures and prompts."""

    part = "local"

    def __init__(self, head: SparseLocal) -> None:
        super().__init__()
        self.similarities = head.similarities

    def forward(self, step: Step) -> Tensor:
        _, local = step.once(self.similarities)
        return F.cross_entropy(step.task.clip.scale * local, step.labels[:, None].expand(-1, local.shape[-1]))


@register
class GalLoP(PromptTrainer):
    """Global prompts with dropout, and local prompts that see the best patches only."""

    layout = Layout(
        "GalLoP",
        (
            Rule("global_prompt", "bank.global_prompt"),
            Rule("local_prompts", "bank.local_prompts"),
            Rule("local_proj.linear.weight", "head.local_proj.weight"),
        ),
    )

    def compose(
        self,
        task: Task,
        n_global: Annotated[int, Setting("N_g: global prompts", low=1)] = 4,
        n_local: Annotated[int, Setting("N_l: local prompts", low=1)] = 4,
        topk: Annotated[Sequence[int], Setting("k of each local prompt, or one for all", low=1)] = (5, 10, 15, 20),
        dropout: Annotated[float, Setting("share of the global prompts that a picture does not see", low=0, below=1)] = 0.75,
        ctx_init: Annotated[str, Setting("words that all prompts start from")] = "A photo of a",
    ) -> Learner:
        """Return the prompts with the loss L_global + L_local."""
        prompts = GlobalLocal(task, n_global, n_local, ctx_init)
        head = SparseLocal(task, prompts, topk)
        return Learner(task, prompts, head=head, loss=KeptGlobal(head, dropout) + EachLocal(head))
