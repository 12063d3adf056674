"""Image tower and classifier as one ONNX graph, compared with the method in onnxruntime before the file is there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from promptmix.errors import ConfigError
from promptmix.predict.export import about, refuse_text_of_pictures
from promptmix.predict.predictor import Predictor, embedding_of
from promptmix.utils import atomic_write

__all__ = ["Deployed", "write_onnx"]

_OPSET = 18
_TOLERANCE = 1e-3  # of the largest score: kernels of two libraries round otherwise in every layer
#: Pictures in a batch while the graph is drawn, and while it is compared.
_DRAWN, _COMPARED = 2, (1, 3)


class Deployed(nn.Module):
    """A method for fixed class names, from pixels to scores.

    Args:
        predictor: the run.
        classnames: C names; None = the run's own.
    """

    def __init__(self, predictor: Predictor, classnames: Sequence[str] | None = None) -> None:
        super().__init__()
        self.learner, self.classifier = predictor.classifier(classnames)
        self.clip = self.learner.clip  # its weights are the graph's

    @property
    def has_router(self) -> bool:
        """Whether pictures are sent to experts."""
        return getattr(self.learner, "router", None) is not None

    @property
    def outputs(self) -> list[str]:
        """Names of what ``forward`` returns."""
        return ["logits", "embedding", *(["routing"] if self.has_router else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits (B, C), the normalised image feature (B, D), and with a router the experts' weights (B, E)."""
        features = self.learner.encode_images(images)
        logits = self.learner.logits(features, self.classifier)
        routing = self.learner.routing(features, self.classifier)
        return logits, embedding_of(self.learner, features), *(() if routing is None else (routing.dense,))


def write_onnx(predictor: Predictor, path: Path, classnames: Sequence[str] | None = None) -> float:
    """Write a run's image tower and classifier, and return the largest difference to the method's own scores.

    The graph takes ``images`` (B, 3, H, W) for any B, resized and normalised as its metadata say.

    Raises:
        ConfigError: the packages are missing, the method can't be drawn as a graph, or the graph gives other scores.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError("--format onnx needs the packages onnx and onnxruntime: pip install 'promptmix[onnx]'") from error
    if predictor.device.type != "cpu":
        raise ConfigError("an ONNX graph is drawn on the CPU; load the run there (--device cpu)")
    model = Deployed(predictor, classnames).eval()
    refuse_text_of_pictures(predictor, model.learner)
    largest = 0.0

    def make(temporary: Path) -> None:
        nonlocal largest
        with _silent():
            _draw(model, predictor, temporary)
        graph = onnx.load(str(temporary))
        words = about(predictor) | {"classnames": list(model.learner.task.classnames)}
        for name, value in words.items():
            graph.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        onnx.save(graph, str(temporary))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        try:
            session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has its own kinds
            raise _not_drawn(predictor, f"not one that onnxruntime reads ({type(error).__name__})") from error
        largest = max(_compare(session, model, predictor, size) for size in _COMPARED)

    atomic_write(path, make)
    return largest


def _draw(model: Deployed, predictor: Predictor, path: Path) -> None:
    """Draw the graph: by tracing, and where that fails through ``torch.export``, which takes ten times as long."""
    pictures = _pictures(predictor, _DRAWN)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": model.outputs, "opset_version": _OPSET}
    axes = {name: {0: "batch"} for name in ("images", *model.outputs)}
    try:
        torch.onnx.export(model, (pictures,), str(path), dynamo=False, dynamic_axes=axes, **names)
        return
    except Exception as error:  # tracing fails in many ways
        first = error
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (pictures,), str(path), dynamo=True, dynamic_shapes=shapes, external_data=False, **names)
    except Exception as error:
        needs = ": it needs onnxscript, pip install 'promptmix[onnx]'" if isinstance(error, ImportError) else ""
        raise _not_drawn(predictor, f"not one of ONNX ({type(error).__name__}{needs})") from first


def _not_drawn(predictor: Predictor, why: str) -> ConfigError:
    return ConfigError(
        f"the graph of TRAINER.NAME {predictor.result.trainer} is {why}, so nothing was written; use `promptmix predict`, or "
        "promptmix.load in Python"
    )


def _compare(session: Any, model: Deployed, predictor: Predictor, size: int) -> float:
    """Return the largest difference of scores on ``size`` random pictures.

    Raises:
        ConfigError: it is more than rounding explains.
    """
    pictures = _pictures(predictor, size)
    with torch.no_grad():
        own = model(pictures)[0].float().numpy()
    try:
        found = session.run(["logits"], {"images": pictures.numpy()})[0]
    except Exception as error:  # onnxruntime has its own kinds
        found, said = None, f"fails on {size} pictures ({type(error).__name__}: it was drawn for {_DRAWN})"
    else:
        apart = float(np.abs(found - own).max())
        if found.shape == own.shape and apart <= _TOLERANCE * float(np.abs(own).max()):
            return apart
        said = f"gives scores that differ by {apart:.2g} on {size} pictures"
    raise ConfigError(
        f"the ONNX graph of TRAINER.NAME {predictor.result.trainer} {said}, so nothing was written; use `promptmix predict`, or "
        "promptmix.load in Python"
    )


def _pictures(predictor: Predictor, size: int) -> Tensor:
    """Return random pictures (B, 3, H, W), normalised."""
    return torch.randn(size, 3, *predictor.config.INPUT.SIZE, generator=torch.Generator().manual_seed(size))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the exporter and its native code say of themselves off the output: whole graphs, where they fail."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            kept = os.dup(number)
            os.dup2(sink.fileno(), number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
