"""``dassl.modeling``: registries of backbones, heads and networks, the ResNets of torchvision, and the net that joins them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix.dassl.importing import lacking
from promptmix.dassl.utils import check_availability, init_network_weights
from promptmix.registry import Registry
from promptmix.utils import get_logger

__all__ = [
    "BACKBONE_REGISTRY",
    "HEAD_REGISTRY",
    "NETWORK_REGISTRY",
    "Registry",
    "Backbone",
    "SimpleNet",
    "build_backbone",
    "build_head",
    "build_network",
    "check_availability",
    "init_network_weights",
    "mlp",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]

#: Dassl's own registries: image backbones without text, which are no CLIP models.
BACKBONE_REGISTRY, HEAD_REGISTRY, NETWORK_REGISTRY = Registry("image backbone"), Registry("head"), Registry("network")


class Backbone(nn.Module):
    """The base of image backbones; ``out_features`` is the width of what ``forward`` returns."""

    def __init__(self) -> None:
        super().__init__()
        self._out_features: int | None = None

    @property
    def out_features(self) -> int | None:
        """Width of the features, or None where it was not set."""
        return self._out_features


class _ResNet(Backbone):
    """A ResNet of torchvision without its classifier."""

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        from torchvision import models

        self.net = getattr(models, name)(weights="IMAGENET1K_V1" if pretrained else None)
        self._out_features = self.net.fc.in_features
        self.net.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@BACKBONE_REGISTRY.register()
def resnet18(pretrained: bool = True, **_: Any) -> Backbone:
    """Return a ResNet-18."""
    return _ResNet("resnet18", pretrained)


@BACKBONE_REGISTRY.register()
def resnet34(pretrained: bool = True, **_: Any) -> Backbone:
    """Return a ResNet-34."""
    return _ResNet("resnet34", pretrained)


@BACKBONE_REGISTRY.register()
def resnet50(pretrained: bool = True, **_: Any) -> Backbone:
    """Return a ResNet-50."""
    return _ResNet("resnet50", pretrained)


@BACKBONE_REGISTRY.register()
def resnet101(pretrained: bool = True, **_: Any) -> Backbone:
    """Return a ResNet-101."""
    return _ResNet("resnet101", pretrained)


@BACKBONE_REGISTRY.register()
def resnet152(pretrained: bool = True, **_: Any) -> Backbone:
    """Return a ResNet-152."""
    return _ResNet("resnet152", pretrained)


class _MLP(nn.Sequential):
    """Linear maps with an activation after each; ``out_features`` is the width of the last."""

    def __init__(self, widths: list[int], activation: type[nn.Module], bn: bool, dropout: float) -> None:
        layers: list[nn.Module] = []
        for into, out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(into, out), *([nn.BatchNorm1d(out)] if bn else []), activation()]
            layers += [nn.Dropout(dropout)] if dropout > 0 else []
        super().__init__(*layers)
        self.out_features = widths[-1]


@HEAD_REGISTRY.register()
def mlp(
    in_features: int = 2048,
    hidden_layers: int | list[int] | tuple[int, ...] = (),
    activation: str = "relu",
    bn: bool = True,
    dropout: float = 0.0,
    **_: Any,
) -> nn.Module:
    """Return a stack of linear maps.

    Args:
        in_features: width of the input.
        hidden_layers: width of each layer.
        activation: ``relu``, ``leaky_relu`` or ``elu``.
        bn: batch norm after each linear map.
        dropout: probability of dropout after each activation.

    Raises:
        ValueError: no layer, or another activation.
    """
    kinds = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU}
    hidden = [hidden_layers] if isinstance(hidden_layers, int) else list(hidden_layers)
    if not hidden or activation not in kinds:
        raise ValueError(
            f"an mlp needs hidden layers (got {hidden}) and an activation of {', '.join(kinds)} (got {activation!r})"
        )
    return _MLP([in_features, *hidden], kinds[activation], bn, dropout)


def build_backbone(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build the image backbone called ``name``."""
    return _build(BACKBONE_REGISTRY, name, verbose, kwargs)


def build_head(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build the head called ``name``."""
    return _build(HEAD_REGISTRY, name, verbose, kwargs)


def build_network(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build the network called ``name``."""
    return _build(NETWORK_REGISTRY, name, verbose, kwargs)


def _build(registry: Registry, name: str, verbose: bool, kwargs: dict[str, Any]) -> Any:
    if verbose:
        get_logger().info("%s: %s", registry.kind.capitalize(), name)
    return registry.get(name)(**kwargs)


class SimpleNet(nn.Module):
    """Backbone, optional head, and a linear classifier.

    Args:
        cfg: the whole config tree.
        model_cfg: its ``MODEL`` node.
        num_classes: C; 0 = no classifier.
        kwargs: passed to the backbone.
    """

    def __init__(self, cfg: CfgNode, model_cfg: CfgNode, num_classes: int, **kwargs: Any) -> None:
        super().__init__()
        backbone, head = model_cfg.BACKBONE, model_cfg.HEAD
        self.backbone = build_backbone(backbone.NAME, cfg.VERBOSE, pretrained=backbone.PRETRAINED, **kwargs)
        self._fdim: int = self.backbone.out_features
        self.head: nn.Module | None = None
        if head.NAME and head.HIDDEN_LAYERS:
            settings = {"activation": head.ACTIVATION, "bn": head.BN, "dropout": head.DROPOUT}
            self.head = build_head(head.NAME, cfg.VERBOSE, in_features=self._fdim, hidden_layers=head.HIDDEN_LAYERS, **settings)
            self._fdim = self.head.out_features  # type: ignore[assignment]
        self.classifier = nn.Linear(self._fdim, num_classes) if num_classes > 0 else None

    @property
    def fdim(self) -> int:
        """Width of the features before the classifier."""
        return self._fdim

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        """Return class scores (B, C), with the features if asked for; the features alone without a classifier."""
        features = self.backbone(x)
        if self.head is not None:
            features = self.head(features)
        if self.classifier is None:
            return features
        scores = self.classifier(features)
        return (scores, features) if return_feature else scores


_OTHERS = [
    *("alexnet", "cnn_digit5_m3sda", "cnn_digitsdg", "cnn_digitsingle", "preact_resnet18", "vgg16"),
    *("wide_resnet_16_4", "wide_resnet_28_2", *(f"efficientnet_b{size}" for size in range(8))),
    *(f"resnet{depth}_{kind}_l{layers}" for depth in (18, 50, 101) for kind in ("ms", "efdmix") for layers in (1, 12, 123)),
    *(f"resnet{depth}_dynamic{kind}" for depth in (18, 50, 101) for kind in ("", "_ms_l1", "_ms_l12", "_ms_l123")),
    *("BasicBlock", "BasicBlockDynamic", "Bottleneck", "BottleneckDynamic", "Conv2dDynamic", "MLP", "MixStyle", "ResNet"),
    *("conv1x1", "conv3x3", "conv3x3_dynamic", "init_pretrained_weights", "load_state_dict", "model_urls"),
    *("fcn_3x32_gctx", "fcn_3x32_gctx_stn", "fcn_3x64_gctx", "fcn_3x64_gctx_stn"),
]
__getattr__ = lacking("dassl.modeling", _OTHERS, "an image network for domain generalisation; torchvision and timm have most")
