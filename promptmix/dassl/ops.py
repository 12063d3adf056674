"""``dassl.modeling.ops``: layers and losses for domain generalisation and semi-supervised learning, written from their papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promptmix.dassl.importing import lacking
from promptmix.dassl.metrics import euclidean_squared_distance

__all__ = [
    "DSBN1d",
    "DSBN2d",
    "EFDMix",
    "MaximumMeanDiscrepancy",
    "MinibatchEnergyDistance",
    "MixStyle",
    "ReverseGrad",
    "Sequential2",
    "SinkhornDivergence",
    "activate_efdmix",
    "activate_mixstyle",
    "create_onehot",
    "cross_entropy",
    "crossdomain_efdmix",
    "crossdomain_mixstyle",
    "deactivate_efdmix",
    "deactivate_mixstyle",
    "ema_model_update",
    "linear_rampup",
    "mixup",
    "random_efdmix",
    "random_mixstyle",
    "reverse_index",
    "run_with_efdmix",
    "run_with_mixstyle",
    "run_without_efdmix",
    "run_without_mixstyle",
    "sharpen_prob",
    "shuffle_index",
    "sigmoid_rampup",
]


class _StyleMixer(nn.Module):
    """Mixes what two pictures' feature maps look like, while training, with probability ``p``.

    Args:
        p: probability of mixing in a forward pass.
        alpha: of Beta(alpha, alpha), which draws the weight of a picture's own style.
        eps: added to variances.
        mix: ``random`` partners, or ``crossdomain``: the second half of the batch is the first half's other domain.
    """

    def __init__(self, p: float = 0.5, alpha: float = 0.1, eps: float = 1e-6, mix: str = "random") -> None:
        super().__init__()
        self.p, self.alpha, self.eps, self.mix = p, alpha, eps, mix
        self.beta = torch.distributions.Beta(alpha, alpha)
        self._activated = True

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"p={self.p}, alpha={self.alpha}, eps={self.eps}, mix={self.mix}"

    def set_activation_status(self, status: bool = True) -> None:
        """Switch the layer on or off."""
        self._activated = status

    def update_mix_method(self, mix: str = "random") -> None:
        """Choose the partners: ``random`` or ``crossdomain``."""
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, C, H, W) in mixed styles."""
        if not self.training or not self._activated or torch.rand(()).item() > self.p:
            return x
        own = self.beta.sample((len(x), 1, 1, 1)).to(x.device)
        return self._mixed(x, own, self._partners(len(x)).to(x.device))

    def _partners(self, size: int) -> Tensor:
        if self.mix == "random":
            return torch.randperm(size)
        if self.mix != "crossdomain":
            raise NotImplementedError(f"mix is {self.mix!r}, but must be 'random' or 'crossdomain'")
        half = size // 2
        first, second = torch.arange(half), torch.arange(half, size)
        return torch.cat([second[torch.randperm(len(second))], first[torch.randperm(len(first))]])

    def _mixed(self, x: Tensor, own: Tensor, partners: Tensor) -> Tensor:
        raise NotImplementedError


class MixStyle(_StyleMixer):
    """Mixes means and deviations of each channel (https://arxiv.org/abs/2104.02008)."""

    def _mixed(self, x: Tensor, own: Tensor, partners: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True).detach()
        spread = (x.var((2, 3), keepdim=True) + self.eps).sqrt().detach()
        new_mean = own * mean + (1 - own) * mean[partners]
        new_spread = own * spread + (1 - own) * spread[partners]
        return (x - mean) / spread * new_spread + new_mean


class EFDMix(_StyleMixer):
    """Mixes the whole distribution of each channel by sorting its values (https://arxiv.org/abs/2203.07740)."""

    def _mixed(self, x: Tensor, own: Tensor, partners: Tensor) -> Tensor:
        flat = x.flatten(2)
        values, order = flat.sort(dim=-1)
        ranked = values[partners].gather(-1, order.argsort(-1))
        weight = (1 - own).flatten(2)
        # The gradient is that of x: the partner's values are data.
        return (flat + weight * (ranked.detach() - flat.detach())).view_as(x)


def _switches(kind: type[_StyleMixer]) -> tuple[Callable[..., Any], ...]:
    """Return what ``Module.apply`` takes to switch all layers of ``kind``, and the two contexts that do so for a while."""

    def changed(change: Callable[[_StyleMixer], None]) -> Callable[[nn.Module], None]:
        return lambda module: change(module) if isinstance(module, kind) else None

    off = changed(lambda layer: layer.set_activation_status(False))
    on = changed(lambda layer: layer.set_activation_status(True))
    random = changed(lambda layer: layer.update_mix_method("random"))
    crossdomain = changed(lambda layer: layer.update_mix_method("crossdomain"))

    @contextmanager
    def run_without(model: nn.Module) -> Iterator[None]:
        model.apply(off)
        try:
            yield
        finally:
            model.apply(on)

    @contextmanager
    def run_with(model: nn.Module, mix: str | None = None) -> Iterator[None]:
        if mix is not None:
            model.apply(random if mix == "random" else crossdomain)
        model.apply(on)
        try:
            yield
        finally:
            model.apply(off)

    return off, on, random, crossdomain, run_without, run_with


(
    deactivate_mixstyle,
    activate_mixstyle,
    random_mixstyle,
    crossdomain_mixstyle,
    run_without_mixstyle,
    run_with_mixstyle,
) = _switches(MixStyle)
(
    deactivate_efdmix,
    activate_efdmix,
    random_efdmix,
    crossdomain_efdmix,
    run_without_efdmix,
    run_with_efdmix,
) = _switches(EFDMix)


class _DSBN(nn.Module):
    """A batch norm per domain; ``select_bn`` chooses whose is used.

    Args:
        num_features: number of channels.
        n_domain: number of domains.
        bn_type: ``1d`` or ``2d``.
    """

    def __init__(self, num_features: int, n_domain: int, bn_type: str) -> None:
        super().__init__()
        kind = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d}[bn_type]
        self.bn = nn.ModuleList(kind(num_features) for _ in range(n_domain))
        self.n_domain, self.domain_idx = n_domain, 0

    def select_bn(self, domain_idx: int = 0) -> None:
        """Use the batch norm of this domain from now on."""
        self.domain_idx = domain_idx

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the chosen domain's statistics."""
        return self.bn[self.domain_idx](x)


class DSBN1d(_DSBN):
    """Domain-specific batch norm of features (B, C) (https://arxiv.org/abs/1906.03950)."""

    def __init__(self, num_features: int, n_domain: int) -> None:
        super().__init__(num_features, n_domain, "1d")


class DSBN2d(_DSBN):
    """Domain-specific batch norm of feature maps (B, C, H, W)."""

    def __init__(self, num_features: int, n_domain: int) -> None:
        super().__init__(num_features, n_domain, "2d")


class _ReverseGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None


class ReverseGrad(nn.Module):
    """The identity, whose gradient has the opposite sign (https://arxiv.org/abs/1409.7495)."""

    def forward(self, x: Tensor, grad_scaling: float = 1.0) -> Tensor:
        """Return ``x``; its gradient is multiplied by ``-grad_scaling``."""
        return _ReverseGrad.apply(x, grad_scaling)


class Sequential2(nn.Sequential):
    """An ``nn.Sequential`` whose layers may take and return several values."""

    def forward(self, *inputs: Any) -> Any:
        """Pass the inputs on from layer to layer."""
        for layer in self:
            inputs = layer(*inputs) if isinstance(inputs, tuple) else layer(inputs)
        return inputs


def cross_entropy(input: Tensor, target: Tensor, label_smooth: float = 0, reduction: str = "mean") -> Tensor:
    """Return the cross entropy of scores (B, C) and labels (B,), smoothed by ``label_smooth``, as PyTorch defines it."""
    return F.cross_entropy(input, target, label_smoothing=label_smooth, reduction=reduction)


def mixup(x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor, beta: float, preserve_order: bool = False) -> tuple[Tensor, Tensor]:
    """Mix pictures (B, C, H, W) and their labels (B, N) (https://arxiv.org/abs/1710.09412).

    Args:
        x1: pictures.
        x2: the pictures they are mixed with.
        y1: labels of ``x1`` as vectors.
        y2: labels of ``x2``.
        beta: of Beta(beta, beta), which draws the weight of ``x1``.
        preserve_order: give the first the larger weight, as MixMatch does.
    """
    weight = torch.distributions.Beta(beta, beta).sample((len(x1), 1)).to(x1.device)
    if preserve_order:
        weight = torch.maximum(weight, 1 - weight)
    of_picture = weight[:, :, None, None]
    return x1 * of_picture + x2 * (1 - of_picture), y1 * weight + y2 * (1 - weight)


class MaximumMeanDiscrepancy(nn.Module):
    """How far two batches of features (B, D) are apart (https://jmlr.org/papers/v13/gretton12a.html).

    Args:
        kernel_type: ``linear``, ``poly`` ((x.y + 2) squared) or ``rbf`` (a sum of widths 1, 5 and 10).
        normalize: scale every feature to length 1 first.
    """

    def __init__(self, kernel_type: str = "rbf", normalize: bool = False) -> None:
        super().__init__()
        kernels: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "linear": lambda x, y: x @ y.T,
            "poly": lambda x, y: (x @ y.T + 2.0) ** 2,
            "rbf": lambda x, y: sum(
                (torch.exp(-euclidean_squared_distance(x, y) / (2 * width**2)) for width in (1, 5, 10)), x.new_zeros(())
            ),
        }
        if kernel_type not in kernels:
            raise NotImplementedError(f"kernel_type is {kernel_type!r}, but must be one of: {', '.join(kernels)}")
        self.kernel, self.normalize = kernels[kernel_type], normalize

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared discrepancy; a picture is not compared with itself."""
        if self.normalize:
            x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        return self._within(x) + self._within(y) - 2 * self.kernel(x, y).mean()

    def _within(self, x: Tensor) -> Tensor:
        others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        return self.kernel(x, x)[others].mean()


class SinkhornDivergence(nn.Module):
    """Entropic optimal transport between batches of features, made zero for equal ones (https://arxiv.org/abs/1706.00292).

    Args:
        dist_metric: ``cosine`` or ``euclidean`` (squared).
        eps: weight of the entropy.
        max_iter: rounds of Sinkhorn's scaling.
        bp_to_sinkhorn: let gradients flow through the plan, not only through the cost.
    """

    tolerance = 1e-3

    def __init__(self, dist_metric: str = "cosine", eps: float = 0.01, max_iter: int = 5, bp_to_sinkhorn: bool = False) -> None:
        super().__init__()
        if dist_metric not in ("cosine", "euclidean"):
            raise ValueError(f"dist_metric is {dist_metric!r}, but must be 'cosine' or 'euclidean'")
        self.dist_metric, self.eps, self.max_iter, self.bp_to_sinkhorn = dist_metric, eps, max_iter, bp_to_sinkhorn

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the divergence of features (M, D) and (N, D)."""
        return 2 * self.transport_cost(x, y) - self.transport_cost(x, x) - self.transport_cost(y, y)

    def transport_cost(self, x: Tensor, y: Tensor, return_pi: bool = False) -> Any:  # a tensor, or two
        """Return the cost of the plan from ``x`` to ``y``, with the plan (M, N) if asked for."""
        if self.dist_metric == "cosine":
            cost = 1 - F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
        else:
            cost = euclidean_squared_distance(x, y)
        plan = self._plan(cost)
        total = (plan if self.bp_to_sinkhorn else plan.detach()).mul(cost).sum()
        return (total, plan) if return_pi else total

    def _plan(self, cost: Tensor) -> Tensor:
        """Return the plan (M, N) with uniform marginals, scaled in the logarithm."""
        log_m, log_n = (math.log(1 / size) for size in cost.shape)
        u, v = cost.new_zeros(len(cost)), cost.new_zeros(cost.shape[1])
        for _ in range(self.max_iter):
            before = u
            u = self.eps * (log_m - torch.logsumexp((v - cost) / self.eps, dim=1))
            v = self.eps * (log_n - torch.logsumexp((u[:, None] - cost) / self.eps, dim=0))
            if (u - before).abs().sum() < self.tolerance:
                break
        return torch.exp((u[:, None] + v - cost) / self.eps)


class MinibatchEnergyDistance(SinkhornDivergence):
    """The energy distance of two halves of each batch (https://arxiv.org/abs/1803.05573)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of features (M, D) and (N, D)."""
        (x1, x2), (y1, y2) = x.split(len(x) // 2)[:2], y.split(len(y) // 2)[:2]
        across = sum(self.transport_cost(a, b) for a in (x1, x2) for b in (y1, y2))
        return across - 2 * self.transport_cost(x1, x2) - 2 * self.transport_cost(y1, y2)


def sharpen_prob(p: Tensor, temperature: float = 2) -> Tensor:
    """Return probabilities (B, C) raised to ``temperature`` and scaled to sum to 1."""
    powered = p**temperature
    return powered / powered.sum(1, keepdim=True)


def reverse_index(data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in reverse order."""
    return data.flip(0), label.flip(0)


def shuffle_index(data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one random order."""
    order = torch.randperm(len(data), device=data.device)
    return data[order], label[order]


def create_onehot(label: Tensor, num_classes: int) -> Tensor:
    """Return labels (B,) as vectors (B, num_classes)."""
    return F.one_hot(label.long(), num_classes).float()


def sigmoid_rampup(current: float, rampup_length: float) -> float:
    """Return exp(-5 (1 - t) squared) at t = ``current / rampup_length``, at most 1 (https://arxiv.org/abs/1610.02242)."""
    if not rampup_length:
        return 1.0
    left = 1 - min(max(current / rampup_length, 0.0), 1.0)
    return math.exp(-5 * left**2)


def linear_rampup(current: float, rampup_length: float) -> float:
    """Return ``current / rampup_length``, between 0 and 1."""
    return min(max(current / rampup_length, 0.0), 1.0) if rampup_length else 1.0


@torch.no_grad()
def ema_model_update(model: nn.Module, ema_model: nn.Module, alpha: float) -> None:
    """Move the parameters of ``ema_model`` towards those of ``model``, keeping the share ``alpha``."""
    for kept, new in zip(ema_model.parameters(), model.parameters(), strict=True):
        kept.mul_(alpha).add_(new, alpha=1 - alpha)


__getattr__ = lacking(
    "dassl.modeling.ops",
    ["Attention", "Conv2dDynamic", "OptimalTransport", "TransNorm1d", "TransNorm2d", "reverse_grad"],
    "a layer for domain generalisation",
)
