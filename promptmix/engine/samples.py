"""What an evaluation says of each picture, kept small: the best classes with their probabilities, and the router's choice.

N pictures, C classes, k classes kept, T temperatures, E experts, K chosen experts. With the scores z of a picture, its best class
m and its own class y, ``log_norm`` at temperature t is log sum_c exp((z_c - z_m) / t). From it follow, at every temperature and
without the C scores, the confidence exp(-log_norm) and the log-likelihood (z_y - z_m) / t - log_norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["TEMPERATURES", "SampleKeeper"]

#: From an eighth to eight times the model's own, 1 among them.
TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-12, 13))


class SampleKeeper:
    """Takes batches of an evaluation in and gives arrays back.

    Args:
        most: k, classes kept for each picture, the most probable first; all where there are fewer.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._paths: list[str] = []
        self._parts: list[dict[str, Tensor]] = []

    def take(self, scores: Tensor, labels: Tensor, paths: Sequence[str] | None, more: Mapping[str, Tensor]) -> None:
        """Take in a batch; nothing waits for the device here.

        Args:
            scores: (B, C), logits.
            labels: (B,).
            paths: of the pictures; None where the batch does not say, then pictures are numbered.
            more: further tensors (B, ...) by name, such as the routing.
        """
        scores = scores.detach().float()
        start = len(self._paths)
        self._paths += paths if paths is not None else map(str, range(start, start + len(labels)))
        best, classes = scores.topk(min(self.most, scores.shape[1]), dim=1)
        below = scores - best[:, :1]
        known = labels.clamp(0, scores.shape[1] - 1)
        gap = below.gather(1, known[:, None])[:, 0].masked_fill(known != labels, -torch.inf)  # a class that has no score
        norms = torch.stack([(below / t).logsumexp(dim=1) for t in TEMPERATURES], dim=1)
        own = {"label": labels, "top_class": classes, "top_probability": scores.softmax(dim=1).gather(1, classes)}
        self._parts.append(own | {"own_gap": gap, "log_norm": norms} | {name: part.detach() for name, part in more.items()})

    def arrays(self, classnames: Mapping[int, str]) -> dict[str, np.ndarray]:
        """Return everything by name.

        Args:
            classnames: by label.

        Returns:
            ``path`` (N,), ``label`` (N,), ``classname`` (C,), ``top_class`` and ``top_probability`` (N, k), ``own_gap`` (N,),
            that is z_y - z_m, ``temperature`` (T,), ``log_norm`` (N, T), and what came as ``more``.
        """
        names = [classnames.get(label, str(label)) for label in range(max(classnames, default=-1) + 1)]
        joined = {name: torch.cat([part[name] for part in self._parts]).cpu().numpy() for name in self._parts[0]}
        found = {"path": np.array(self._paths), "classname": np.array(names), "temperature": np.array(TEMPERATURES, np.float32)}
        for name, array in joined.items():
            found[name] = array.astype(np.int32 if array.dtype.kind in "iu" else np.float32)
        return found
