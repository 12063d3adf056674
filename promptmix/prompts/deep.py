"""Deep prompts: learned tokens per layer of both towers, as schedules of tensors that methods put together.

Layer 0 is the input. A prompt of depth J has tokens for the layers 0 ... J-1; before each of the layers 1 ... J-1 they replace
those that came out of the layer below. W is the width of a tower, n the tokens of a layer, E the number of prompts, B images,
C classes, D joint width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix.clip import CLIP
from promptmix.clip.vision import PromptStep, VisualPrompts
from promptmix.config import get_key
from promptmix.errors import ConfigError
from promptmix.prompts.roles import PromptLearner, Task
from promptmix.prompts.trainer import PromptTrainer

#: Standard deviation of tokens that start at random, in all methods.
STD = 0.02


def require_at_least(cfg: CfgNode, node: str, **limits: float) -> None:
    """Refuse values of ``node`` (``"TRAINER.MAPLE"``) below their limits (``PROMPT_DEPTH=1``).

    Raises:
        ConfigError: a value is too small; the message names the key and the smallest value.
    """
    for key, limit in limits.items():
        value = get_key(cfg, f"{node}.{key}")
        if value < limit:
            raise ConfigError(f"{node}.{key} is {value}, but must be {limit} or more")


def start_words(clip: CLIP, node: str, n_ctx: int, words: str, key: str = "N_CTX") -> tuple[Tensor, tuple[int, ...]]:
    """Return where a context starts from: the first ``n_ctx`` tokens of ``words``, which then are learned.

    Args:
        clip: the frozen model.
        node: config node of the method, for the message.
        n_ctx: n, learned tokens.
        words: such as "a photo of a"; "" starts at random.
        key: the key in ``node`` that gives ``n_ctx``, for the message.

    Returns:
        The start (n, W), and the ids of the other tokens of ``words``, which stay as they are between context and class name.

    Raises:
        ConfigError: ``words`` has fewer than ``n_ctx`` tokens.
    """
    tower = clip.text
    if not words:
        return torch.empty(n_ctx, tower.width).normal_(std=STD), ()
    ids = tower.tokenizer.encode(words.replace("_", " "))
    if n_ctx > len(ids):
        raise ConfigError(
            f"{node}.{key} is {n_ctx}, but {node}.CTX_INIT {words!r} has only {len(ids)} tokens to start from; "
            f"set {key} to {len(ids)} or less, or CTX_INIT to '' for a random start"
        )
    return tower.embed(ids[:n_ctx]).cpu(), ids[n_ctx:]


class TextPrompts(nn.Module):
    """Prompts ``[SOT] [ctx] words class name . [EOT]`` whose n context tokens are learned anew for each of the first layers.

    Args:
        task: the frozen model.
        start: (n, W) for one prompt or (E, n, W), where the context at the input starts from; deeper ones start at random.
        words: ids of fixed tokens between context and class name.
        depth: J, layers with tokens of their own.
    """

    def __init__(self, task: Task, start: Tensor, words: Sequence[int] = (), depth: int = 1) -> None:
        super().__init__()
        self.task, self.words = task, tuple(words)
        self.ctx = nn.Parameter(start.clone())
        self.deeper = nn.ParameterList(nn.Parameter(torch.empty_like(start).normal_(std=STD)) for _ in range(depth - 1))

    @property
    def layers(self) -> list[Tensor]:
        """The context of each layer, first to last: J tensors (n, W) or (E, n, W)."""
        return [self.ctx, *self.deeper]

    def forward(self, names: Sequence[str]) -> Tensor:
        """Return normalised text features (E, C, D) of C class names."""
        tower = self.task.clip.text
        context, *deeper = (_with_experts(layer) for layer in self.layers)
        fixed, stop = (tower.embed(ids)[None] for ids in (self.words, tower.tokenizer.encode(".")))
        prompts = tower.compose(context, fixed, tower.tokenizer.class_tokens(names), stop)
        return F.normalize(tower(prompts, dict(enumerate(deeper, start=1))), dim=-1)


class VisionPrompts(nn.Module):
    """Tokens of the image tower, n for each of the first J layers, replaced from layer to layer; they start at random.

    Args:
        width: W of the image tower.
        n_ctx: n.
        depth: J.
    """

    def __init__(self, width: int, n_ctx: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(n_ctx, width).normal_(std=STD)) for _ in range(depth))

    def forward(self) -> VisualPrompts:
        """Return the schedule for the image tower."""
        return replace_each_layer(list(self.layers))


def replace_each_layer(tokens: Sequence[Tensor]) -> VisualPrompts:
    """Return the schedule that appends the first of J tensors (n, W) at the input and then replaces it before each layer."""
    return {i: PromptStep(new, remove=tokens[i - 1].shape[-2] if i else 0) for i, new in enumerate(tokens)}


class DeepLearner(PromptLearner):
    """Scores ``s * <f_b, t_c>``, with both features from towers that are prompted in depth."""

    image_is_frozen = False

    @abstractmethod
    def visual_prompts(self) -> VisualPrompts:
        """Return what happens to the image tower's tokens; empty leaves the tower as it is."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Return normalised image features (B, D)."""
        return self.clip.encode_image(images, self.visual_prompts())

    def logits(self, image_features: Tensor, classifier: Tensor) -> Tensor:
        """Return scores (B, C) for text features (C, D)."""
        return self.clip.scale * image_features @ classifier.to(image_features.dtype).T


class IndependentPrompts(DeepLearner):
    """Deep prompts of both towers that know nothing of each other.

    Args:
        task: the frozen model and the class names.
        text: the text tower's prompts.
        vision: the image tower's prompts; None leaves it frozen.
    """

    def __init__(self, task: Task, text: TextPrompts, vision: VisionPrompts | None) -> None:
        super().__init__(task)
        self.text, self.vision = text, vision
        self.image_is_frozen = vision is None

    def visual_prompts(self) -> VisualPrompts:
        """Return the image tower's schedule."""
        return {} if self.vision is None else self.vision()

    def classifier(self) -> Tensor:
        """Return normalised text features (C, D)."""
        return self.text(self.task.classnames)[0]


class DeepPromptTrainer(PromptTrainer):
    """A trainer whose prompts reach into the towers, with the checks of how deep they may."""

    @property
    def node_name(self) -> str:
        """The method's config node as it is written in YAML."""
        return f"TRAINER.{self.cfg.TRAINER.NAME.upper()}"

    def depth(self, key: str, *, text: bool = False, vision: bool = False) -> int:
        """Return the depth J that ``key`` of the method's node gives.

        Args:
            key: such as ``PROMPT_DEPTH``.
            text: the text tower gets prompts of this depth.
            vision: the image tower does.

        Raises:
            ConfigError: a tower has fewer layers, or the image tower is no vision transformer; the message names the remedy.
        """
        depth = int(self.node[key])
        towers = {"text": len(self.clip.text.blocks)} if text else {}
        if vision:
            if not self.clip.image.takes_prompts:
                raise ConfigError(
                    f"TRAINER.NAME {self.cfg.TRAINER.NAME} puts prompts into the image tower, but that of MODEL.BACKBONE.NAME "
                    f"{self.clip.name} ({type(self.clip.image.visual).__name__}) takes none; choose a vision transformer such as "
                    "ViT-B/16 or tiny-vit"
                )
            towers["image"] = self.clip.image.depth
        for tower, layers in towers.items():
            if depth > layers:
                raise ConfigError(
                    f"{self.node_name}.{key} is {depth}, but the {tower} tower of {self.clip.name} has {layers} layers; "
                    f"set it to {layers} or less"
                )
        return depth

    def independent_parts(self, task: Task) -> tuple[TextPrompts, VisionPrompts | None]:
        """Return the prompts of both towers that the keys of ``add_independent_config`` describe."""
        node, vision = self.node, None
        if node.N_CTX_VISION:  # first, since a backbone without visual prompts is the larger mistake
            depth = self.depth("PROMPT_DEPTH_VISION", vision=True)
            vision = VisionPrompts(self.clip.image.width, node.N_CTX_VISION, depth)
        depth = self.depth("PROMPT_DEPTH_TEXT", text=True)
        start, words = start_words(self.clip, self.node_name, node.N_CTX_TEXT, node.CTX_INIT, "N_CTX_TEXT")
        return TextPrompts(task, start, words, depth), vision


def add_independent_config(node: CfgNode, *, n_ctx: int, depth: int) -> None:
    """Declare the keys of independent prompts of both towers.

    Args:
        node: the method's node.
        n_ctx: default of tokens in each tower.
        depth: default of layers in each tower.
    """
    node.N_CTX_VISION = n_ctx  # learned tokens in the image tower; 0 leaves it frozen
    node.N_CTX_TEXT = n_ctx  # learned tokens in the text tower, the first ones of CTX_INIT
    node.CTX_INIT = "a photo of a"  # words before the class name; "" = random tokens alone
    node.PROMPT_DEPTH_VISION = depth  # J_v: layers with visual tokens of their own, from the first; 0 with N_CTX_VISION 0
    node.PROMPT_DEPTH_TEXT = depth  # J_t: layers with text tokens of their own


def validate_independent(cfg: CfgNode, node: str) -> None:
    """Check the keys of ``add_independent_config`` in ``node`` (``"TRAINER.IVLP"``).

    Raises:
        ConfigError: a number is too small, or visual tokens and their depth contradict each other.
    """
    require_at_least(cfg, node, N_CTX_TEXT=1, PROMPT_DEPTH_TEXT=1, N_CTX_VISION=0, PROMPT_DEPTH_VISION=0)
    tokens, depth = get_key(cfg, f"{node}.N_CTX_VISION"), get_key(cfg, f"{node}.PROMPT_DEPTH_VISION")
    if bool(tokens) != bool(depth):
        raise ConfigError(
            f"{node}.N_CTX_VISION is {tokens} and {node}.PROMPT_DEPTH_VISION is {depth}; "
            "set both to 0 for text prompts alone, or both to 1 or more"
        )


def _with_experts(layer: Tensor) -> Tensor:
    """Give a context (n, W) its expert axis: (1, n, W)."""
    return layer if layer.dim() == 3 else layer[None]
