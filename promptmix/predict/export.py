"""What a run learned as plain arrays: zero-shot weights for chosen class names, a mixture's experts and router, the prompts.

B images, C classes, E experts, D joint width. A classifier goes out as arrays only where it is what the arrays say: the scores
that they give are compared with the method's own on random features, and what differs is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix.errors import ConfigError
from promptmix.predict.arrays import write_arrays
from promptmix.predict.predictor import Predictor
from promptmix.prompts.learner import Learner, PromptLearner
from promptmix.version import __version__

__all__ = ["Exported", "about", "arrays_of", "has_arrays", "refuse_text_of_pictures", "write"]

#: Largest difference of scores that rounding explains, as a share of the largest score.
_TOLERANCE = 1e-4
_PROBES = 64


@dataclass(frozen=True)
class Exported:
    """A classifier as arrays.

    Attributes:
        arrays: ``weights`` (C, D), or (E, C, D) with ``gate`` (E, D), ``gate_bias`` (E,) and ``k`` of a router; ``bias`` (C,),
            ``scale``, ``temperature``, ``mean`` (3,), ``std`` (3,), ``size`` (2,), and the learned tensors as ``prompts/<name>``.
        words: ``classnames``, and ``about`` as JSON.
    """

    arrays: dict[str, Any]
    words: dict[str, Sequence[str] | str]


def arrays_of(predictor: Predictor, classnames: Sequence[str] | None = None) -> Exported:
    """Return a run's classifier for class names (None = its own).

    Raises:
        ConfigError: the method changes the image tower, or its scores are not linear in the image feature; export to ONNX.
        CheckpointError: the run's prompts belong to its own classes.
    """
    learner, classifier = predictor.classifier(classnames)
    refuse_text_of_pictures(predictor, learner)
    found = _linear(learner, classifier)
    if isinstance(found, str):
        raise ConfigError(f"{_name(predictor)} {found}, {_REMEDY}")
    cfg = predictor.config
    arrays: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}
    arrays |= {"temperature": np.float32(predictor.temperature), "size": np.array(cfg.INPUT.SIZE)}
    arrays |= {"mean": np.array(cfg.INPUT.PIXEL_MEAN, np.float32), "std": np.array(cfg.INPUT.PIXEL_STD, np.float32)}
    arrays |= {f"prompts/{name}": tensor.detach().cpu().numpy() for name, tensor in learner.state_dict().items()}
    words = {"classnames": learner.task.classnames, "about": json.dumps(about(predictor))}
    return Exported(arrays, words)


_REMEDY = "so no classifier as arrays is the same; export it with --format onnx, which holds the image tower too"


def has_arrays(learner: PromptLearner) -> bool:
    """Tell whether ``arrays_of`` has the arrays of a method that has learned."""
    if learner.text_per_picture:
        return False
    with torch.no_grad():
        return not isinstance(_linear(learner, learner.classifier()), str)


def _linear(learner: PromptLearner, classifier: Any) -> dict[str, Tensor] | str:  # whatever its ``logits`` take
    """Return the arrays of a classifier that is linear in the frozen tower's feature; else why there are none."""
    if not learner.image_is_frozen or learner.feature_kind or _encodes_itself(learner):
        return (
            "is not a classifier of the frozen tower's normalised feature alone (it changes the tower or the feature, or reads "
            "more of it)"
        )
    scale = learner.clip.scale.detach().float()
    width, device = learner.clip.embed_dim, scale.device
    with torch.no_grad():
        gate = getattr(getattr(learner, "router", None), "as_linear", lambda: None)()
        if gate is not None:
            zeros = torch.zeros(classifier.shape[1], device=device)
            found = {"weights": classifier.float(), "bias": zeros if learner.clip.bias is None else zeros + learner.clip.bias}
            found |= {"gate": gate[0].float(), "gate_bias": gate[1].float(), "k": torch.tensor(gate[2])}
        else:
            nothing = torch.zeros(1, width, device=device)
            bias = learner.logits(nothing, classifier).float()[0]
            rows = learner.logits(torch.eye(width, device=device), classifier).float() - bias
            found = {"weights": rows.T / scale, "bias": bias}
        found["scale"] = scale
        random = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0))
        features = F.normalize(random, dim=-1).to(device)
        own = learner.logits(features, classifier).float()
        same = (scores(found, features) - own).abs().max() <= _TOLERANCE * own.abs().max()  # of NaN too it is False
    return found if bool(same) else "gives scores that are not linear in the image feature"


def scores(arrays: dict[str, Tensor], features: Tensor) -> Tensor:
    """Return scores (B, C) that the arrays give for normalised image features (B, D)."""
    weights = arrays["weights"]
    if "gate" in arrays:
        routed = features @ arrays["gate"].T + arrays["gate_bias"]
        kept, chosen = routed.topk(int(arrays["k"]), dim=-1)
        shares = torch.zeros_like(routed).scatter(1, chosen, kept.softmax(dim=-1))
        weights = torch.einsum("be,ecd->bcd", shares, weights)
        return arrays["scale"] * torch.einsum("bd,bcd->bc", features, weights) + arrays["bias"]
    return arrays["scale"] * features @ weights.T + arrays["bias"]


def refuse_text_of_pictures(predictor: Predictor, learner: PromptLearner) -> None:
    """Refuse a method whose text features are made anew for each picture: a file would need the text tower too.

    Raises:
        ConfigError: the method is such a one.
    """
    if learner.text_per_picture:
        raise ConfigError(
            f"{_name(predictor)} makes the text features anew for each picture, so no file of them can be written; use "
            "`promptmix predict`, or promptmix.load in Python"
        )


def _encodes_itself(learner: PromptLearner) -> bool:
    """Tell whether a learner that is not a composition encodes pictures in its own way."""
    return not isinstance(learner, Learner) and type(learner).encode_images is not PromptLearner.encode_images


def _name(predictor: Predictor) -> str:
    return f"TRAINER.NAME {predictor.result.trainer}"


def about(predictor: Predictor) -> dict[str, Any]:
    """Return what an exported file says of itself: which run, which backbone, and how pictures are read."""
    cfg = predictor.config
    return {
        "promptmix": __version__,
        "trainer": predictor.result.trainer,
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "tag": cfg.MODEL.BACKBONE.TAG,
        "size": list(cfg.INPUT.SIZE),
        "mean": list(cfg.INPUT.PIXEL_MEAN),
        "std": list(cfg.INPUT.PIXEL_STD),
        "interpolation": cfg.INPUT.INTERPOLATION,
        "reading": predictor.reading,
        "temperature": predictor.temperature,
    }


def write(exported: Exported, path: Path) -> None:
    """Write a classifier as ``.npz`` or ``.safetensors``."""
    write_arrays(path, exported.arrays, exported.words)
