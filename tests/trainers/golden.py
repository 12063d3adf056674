"""What the parity tests share: the golden weights as a backbone, and the comparison with the authors' numbers."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn

from promptmix.clip import CLIP, Tokenizer
from promptmix.clip.load import openai_config
from promptmix.prompts.learner import LossTerms, PromptLearner
from promptmix.prompts.roles import Task

FOLDER = Path(__file__).resolve().parent.parent / "golden"
RELATIVE = 1e-4


@lru_cache(maxsize=1)
def seeded():
    """The module that rebuilds weights, pictures and learned tensors."""
    spec = importlib.util.spec_from_file_location("golden_weights", FOLDER / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def _stream_once(stream: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """``stream``, keeping what it drew: drawing takes seconds, and models of other depths share most of it."""
    return lru_cache(maxsize=None)(stream)


@lru_cache(maxsize=2)
def _model(spec: tuple[tuple[str, int], ...]) -> tuple[open_clip.CLIP, Tensor]:
    """Return the model and its marks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in spec:
            patch.setitem(seeded().SPEC, name, size)
        if all(name.endswith("_layers") for name, _ in spec):  # other widths share nothing, and take memory
            patch.setattr(seeded(), "stream", _stream_once(seeded().stream))
        state = {name: torch.from_numpy(value) for name, value in seeded().state_dict().items()}
    with torch.device("meta"):  # drawing weights that are replaced takes as long again
        model = open_clip.CLIP(**openai_config(state))
    model.load_state_dict(state, assign=True)
    model.attn_mask = torch.full(model.attn_mask.shape, -torch.inf).triu_(1)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model, _marks(model)


def _marks(model: nn.Module) -> Tensor:
    """Return one number of each tensor, by which a model that was changed is known."""
    return torch.stack([p.detach().flatten()[0] for p in model.parameters()])


def golden_clip(**spec: int) -> CLIP:
    """A new frozen CLIP with the golden weights; ``spec`` changes their sizes (``text_layers=12``), as a case's json says.

    All that are made share their numbers: who changes one in place takes a copy of it.
    """
    other = tuple(sorted((name, size) for name, size in spec.items() if seeded().SPEC[name] != size))
    whole, marks = _model(other)
    assert torch.equal(_marks(whole), marks), "a test changed the weights that all golden models share"
    model = copy.deepcopy(whole, {id(p): nn.Parameter(p.detach()) for p in whole.parameters()})
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return CLIP(model, Tokenizer(), "golden", mean=mean, std=std, image_size=64)


@lru_cache(maxsize=1)
def golden_resnet() -> CLIP:
    """A frozen CLIP with a small ResNet, every tensor of which is drawn by its name."""
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, patch_size=None, image_size=64)  # type: ignore[arg-type]
    text = open_clip.CLIPTextCfg(width=128, heads=2, layers=2)
    model = open_clip.CLIP(64, vision, text, quick_gelu=True)
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.dim() and name != "attn_mask":
            drawn = torch.from_numpy(seeded().stream(f"resnet/{name}", tuple(tensor.shape)))
            small = 0.1 * drawn + (1 if name.endswith("weight") else 0)
            spread = min(0.2, tensor[0].numel() ** -0.5)
            tensor.copy_(0.5 + drawn**2 if name.endswith("running_var") else small if tensor.dim() == 1 else spread * drawn)
    state["logit_scale"].fill_(math.log(100))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return CLIP(model, Tokenizer(), "golden resnet", mean=mean, std=std, image_size=64)


def golden_task(clip: CLIP | None = None, classes: int = 5, templates: tuple[str, ...] = ("a photo of a {}.",)) -> Task:
    """The golden class names; the first ``classes`` are told apart, all five are known."""
    names = tuple(seeded().CLASSNAMES)
    return Task(clip or golden_clip(), names[:classes], names, templates, (templates,))


def images() -> Tensor:
    return torch.from_numpy(seeded().images())


def labels(classes: int = 5) -> Tensor:
    """The golden labels; with fewer classes the highest label is the last class, as in the recorded runs."""
    return torch.tensor(seeded().LABELS).clamp(max=classes - 1)


def numbers(case: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{case}.npz") as file:
        return {name: file[name] for name in file.files}


def set_learned(case: str, learner: nn.Module, names: dict[str, str], starts: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """Give every learned tensor its golden value; ``names`` maps the authors' names to ours, ``starts`` keep theirs below it.

    Returns:
        Our parameters by the authors' names; all of the case's tensors and all of the learner's take part.
    """
    shapes = json.loads((FOLDER / f"{case}.json").read_text())["learned"]
    ours = dict(learner.named_parameters())
    assert set(names) == set(shapes)
    assert set(names.values()) == set(ours)
    with torch.no_grad():
        for theirs, our in names.items():
            value = torch.from_numpy(seeded().learned(case, theirs, tuple(shapes[theirs])))
            value = value.reshape(ours[our].shape)
            ours[our].copy_(value + ours[our] if theirs in starts else value)
    return {theirs: ours[our] for theirs, our in names.items()}


def close(ours: Tensor | float, theirs: np.ndarray, scale: float | None = None) -> None:
    """Assert agreement to 1e-4 of the largest number (or of ``scale``)."""
    ours = ours.detach().double().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if theirs.size:
        reference = np.abs(theirs).max() if scale is None else scale
        assert np.abs(ours.reshape(theirs.shape) - theirs).max() <= RELATIVE * max(reference, 1e-12)


def compare(
    case: str,
    learner: PromptLearner,
    names: dict[str, str],
    classes: int = 5,
    starts: tuple[str, ...] = (),
    pictures: Tensor | None = None,
    values: str = "",
) -> LossTerms:
    """Assert that logits, loss and every gradient are the authors'; return the loss terms for further checks.

    Args:
        pictures: those that the loss takes, where these are not the golden ones alone.
        values: the case whose learned values are taken, where they are another one's.
    """
    parameters = set_learned(values or case, learner, names, starts)
    expected = numbers(case)
    with torch.no_grad():
        close(learner.logits(learner.features(images()), learner.classifier()), expected["logits"])
    terms = learner.loss(learner.step(images() if pictures is None else pictures, labels(classes)))
    close(terms.total, expected["loss"])
    terms.total.backward()
    for theirs, parameter in parameters.items():
        if f"gradnorm:{theirs}" not in expected:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = float(expected[f"gradnorm:{theirs}"])
        close(gradient.double().norm(), expected[f"gradnorm:{theirs}"])  # millions of float32 squares round
        head = expected[f"gradhead:{theirs}"]
        close(gradient.flatten()[: len(head)], head, scale=norm)
    return terms
