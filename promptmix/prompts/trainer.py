"""The trainer that every prompt-learning method extends: frozen CLIP, learned prompts, text encoded once per evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from yacs.config import CfgNode

from promptmix.clip import load_clip
from promptmix.clip.reference import choose_ways
from promptmix.clip.sizes import check_size, check_takes, warn_of_other_input
from promptmix.config import source_of
from promptmix.config.declare import declare_all, inherited_by, key_of, settings_of
from promptmix.cost.estimate import explained
from promptmix.data.descriptions import Descriptions, parse_descriptions, read_descriptions
from promptmix.data.features.cache import FeatureCache, open_cache
from promptmix.data.features.rows import Kept, in_order
from promptmix.data.features.views import ReplayLoader, cache_views, feature_loader, is_steady
from promptmix.data.reading.streams import get_streams
from promptmix.engine import TrainerX, build_lr_scheduler, build_optimizer, convert
from promptmix.engine.checkpoint import load_pretrained_weights, load_state_dict_strict, read_model
from promptmix.engine.evaluator import compute_accuracy
from promptmix.engine.layout import Layout
from promptmix.engine.league import LABELLED
from promptmix.engine.openworld import OpenWorld
from promptmix.engine.precision import Precision
from promptmix.engine.resume import from_streams
from promptmix.errors import CheckpointError, ConfigError, PluginError, SettingError
from promptmix.prompts.average import GaussianAverage
from promptmix.prompts.compiled import CompiledStep, check_step, compiled_step
from promptmix.prompts.kept import kept_of
from promptmix.prompts.learner import LossTerms, PromptLearner
from promptmix.prompts.roles import LossSum, PromptBank, Routing, Task, build_component, build_losses
from promptmix.prompts.stages import Stage, Stages
from promptmix.prompts.step import Step
from promptmix.utils import count_num_param, get_logger


class PromptTrainer(TrainerX):
    """A Dassl trainer for prompts on a frozen CLIP. A method defines ``compose``, whose settings are its config node.

    Class attributes:
        roles: default part per role that YAML may replace (``{"ROUTER": HardPromptTopK}``; "" = none); others are unused.
        layout: how the authors' code saves the method, for ``--model-dir`` and ``promptmix convert``; None = not known.
        schedule_unit: what one step of the learning-rate schedule is, ``epoch`` or ``step`` (then MAX_EPOCH counts epochs still,
            and the schedule spans all their batches).
        views: augmented views of each training picture that the method can read (``DATALOADER.K_TRANSFORMS``).
        unlabeled: it learns from pictures alone: its steps have no labels, and ``DATASET.UNLABELED`` gives it more pictures.
        ignores: keys of the core tree that these trainers do not read; other values than the default are refused.
    """

    roles: ClassVar[Mapping[str, type | str]] = {}
    layout: ClassVar[Layout | None] = None
    schedule_unit: ClassVar[str] = "epoch"
    views: ClassVar[int] = 1
    unlabeled: ClassVar[bool] = False
    ignores: ClassVar[tuple[str, ...]] = ("MODEL.HEAD.NAME", "INPUT.NO_TRANSFORM", "DATASET.UNLABELED")

    model: PromptLearner  # made by build_model()
    #: What the method sees beside labelled pictures (``promptmix.engine.league``).
    league: str = LABELLED

    def build_data_loader(self) -> None:
        """Make the loaders; a method that learns from pictures alone gets those without labels.

        Raises:
            ConfigError: such pictures are asked for, and the data set gives none.
        """
        super().build_data_loader()
        if self.cfg.DATASET.UNLABELED == "none":
            return
        if self.train_loader_u is None:
            node = self.cfg.DATASET
            raise ConfigError(f"DATASET.UNLABELED is {node.UNLABELED!r}, but {node.NAME} has labelled ones alone; set it to none")
        self.train_loader_x = self.train_loader_u

    def compose(self, task: Task) -> PromptLearner:
        """Return the method's learned part for ``task``.

        Further arguments are the method's settings, annotated with ``promptmix.config.declare.Setting``: the keys of its node
        ``TRAINER.<NAME IN UPPER CASE>``. Parts that YAML chooses come from ``part`` and ``losses``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compose(task, ...)")

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Declare the settings of ``compose`` in the method's node."""
        declare_all(node, cls.compose)

    @classmethod
    def validate(cls, cfg: CfgNode) -> None:
        """Raise ``ConfigError`` for settings that can't work together or would be ignored; ``cfg`` is the whole tree."""
        for constructor in inherited_by(cls.compose):
            constructor.check_settings(cfg, f"TRAINER.{cfg.TRAINER.NAME.upper()}")

    def build_learner(self, task: Task) -> PromptLearner:
        """Compose the method with the settings of its node.

        Raises:
            ConfigError: a setting doesn't fit the model or the data set; the message names its key.
            PluginError: what ``compose`` returns is not a learner.
        """
        try:
            made: object = self.compose(task, **{name: self.node[key_of(name)] for name in settings_of(self.compose)})
        except SettingError as error:
            raise error.under(f"TRAINER.{self.cfg.TRAINER.NAME.upper()}") from None
        if not isinstance(made, PromptLearner):
            by = f"{type(self).__name__}.compose"
            raise PluginError(f"{by} returned a {type(made).__name__}, but must return a Learner; see docs/write-a-method.md")
        return made

    def part(self, role: str, task: Task, *parts: Any) -> Any:
        """Return the part that YAML, or else ``roles``, chooses for ``role``; None where it chooses none."""
        return build_component(self.cfg, role, self.roles[role], task, *parts)

    def bank(self, task: Task) -> PromptBank:
        """Return the bank that YAML, or else ``roles``, chooses.

        Raises:
            ConfigError: it chooses none.
        """
        bank: PromptBank | None = self.part("PROMPT_BANK", task)
        if bank is None:
            raise ConfigError(
                f"PROMPT_BANK.NAME is 'none', but {self.cfg.TRAINER.NAME} can't do without prompts; leave the key out"
            )
        return bank

    def losses(self, role: str, task: Task, bank: PromptBank) -> LossSum | None:
        """Return the loss, or sum of losses, that YAML, or else ``roles``, chooses for ``role``; None where it chooses none."""
        return build_losses(self.cfg, role, self.roles[role], task, bank)

    @property
    def node(self) -> CfgNode:
        """The method's own config node."""
        return self.cfg.TRAINER[self.cfg.TRAINER.NAME.upper()]

    def build_optimizer(self, model: PromptLearner) -> torch.optim.Optimizer:
        """Return the optimizer of the learned tensors; by default the one that ``OPTIM`` names."""
        return build_optimizer(model, self.cfg.OPTIM)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the learning-rate schedule, stepped every ``schedule_unit``; by default the one that ``OPTIM`` names."""
        optim = self.cfg.OPTIM
        if self.schedule_unit == "step":
            optim = optim.clone()
            optim.defrost()
            optim.MAX_EPOCH *= max(len(self.train_loader_x or ()), 1)
        return build_lr_scheduler(optimizer, optim)

    def build_stages(self, model: PromptLearner) -> Sequence[Stage]:
        """Return the stages of training, for methods that train one thing after another; () has all learn all along."""
        return ()

    def weight_average(self, model: PromptLearner) -> GaussianAverage | None:
        """Return the average over epochs that is deployed after the last; None deploys the last weights."""
        return None

    def build_model(self) -> None:
        """Load the frozen model, build the learner, its optimizer and schedule, and register them as ``prompt_learner``."""
        cfg, log = self.cfg, get_logger()
        log.info("Loading CLIP (backbone: %s)", cfg.MODEL.BACKBONE.NAME)
        check_size(cfg)
        self.clip = load_clip(cfg).to(self.device)
        check_takes(self.clip, cfg.INPUT.SIZE)
        check_step(cfg, self.device, changes_gradients=type(self).take_gradients is not PromptTrainer.take_gradients)
        warn_of_other_input(cfg, self.clip)
        self.precision = Precision(cfg.TRAINER.PREC, self.device)
        choose_ways(self.clip, cfg.MODEL)
        task = self._task()
        self.model = self.build_learner(task).to(self.device)
        if cfg.DATASET.DESCRIPTIONS and not task.descriptions.were_read:
            by = f"{cfg.DATASET.DESCRIPTIONS!r}, which nothing in {cfg.TRAINER.NAME} reads"
            raise ConfigError(f"DATASET.DESCRIPTIONS is {by}; leave it out")
        self.model.sparse_experts = cfg.MODEL.SPARSE_EXPERTS
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(self.model, cfg.MODEL.INIT_WEIGHTS)
        log.info("Learned parameters: %s", f"{count_num_param(self.model):,}")
        self.approximations: list[str] = []  # for results.json
        self.stages = Stages(self.build_stages(self.model), self.max_epoch * len(self.train_loader_x or ()))
        self._compiled: CompiledStep | None = None
        self._classifier: Any = None
        self._routing: Routing | None = None
        self._testing = False
        self.average: GaussianAverage | None = None
        if self.model.state_dict():
            learns = any(parameter.requires_grad for parameter in self.model.parameters())
            optim = self.build_optimizer(self.model) if learns else None
            self.register_model("prompt_learner", self.model, optim, None if optim is None else self.build_scheduler(optim))
            self.average = self.weight_average(self.model)
            if self.average is not None:
                self.register_model("weight_average", self.average)

    def _task(self) -> Task:
        dataset = self.dm.dataset
        names = tuple(self.lab2cname[label] for label in range(self.num_classes))
        templates = tuple(getattr(dataset, "templates", ())) or ("a photo of a {}.",)
        given = self.cfg.DATASET.TEMPLATE_GROUPS or getattr(dataset, "template_groups", ())
        groups = tuple(tuple(group) for group in given) or ((templates[0],),)
        labels = tuple(item.label for item in getattr(dataset, "train_x", None) or ())
        known = tuple(getattr(dataset, "all_classnames", names))
        is_open = self.cfg.DATASET.SUBSAMPLE_CLASSES == "open"
        return Task(self.clip, names, known, templates, groups, labels, is_open, self._descriptions())

    def _descriptions(self) -> Descriptions:
        """Return the sentences about classes that the config names, or else the data set's own."""
        path, name = self.cfg.DATASET.DESCRIPTIONS, self.cfg.DATASET.NAME
        if path:
            return read_descriptions(path, name)
        return parse_descriptions(getattr(self.dm.dataset, "descriptions", {}), f"data set {name}")

    def before_train(self) -> None:
        """Resume if there is something to resume; then encode cached views, if asked for.

        Raises:
            ConfigError: views are to be cached, but the method changes the image features while it trains.
        """
        super().before_train()
        self.model.before_training()
        if self.model.needs_preparing and self.start_epoch == 0:
            self.model.prepare(self._look)
            self.first_streams = get_streams()
        views = self.cfg.INPUT.CACHED_VIEWS
        if not views or isinstance(self.train_loader_x, ReplayLoader):
            return
        if not self.model.image_is_frozen:
            raise ConfigError(
                f"INPUT.CACHED_VIEWS is {views}, but {self.cfg.TRAINER.NAME} trains the image side, "
                "so features can't be kept; set it to 0"
            )
        epochs = max(self.max_epoch, 1)
        if views < epochs and not is_steady(self.cfg.INPUT.TRANSFORMS):
            self.approximations.append(f"INPUT.CACHED_VIEWS: {views} augmented views take turns over {epochs} epochs")
        if self.start_epoch >= self.max_epoch:
            return
        validates = self.cfg.TEST.FINAL_MODEL == "best_val" and not self.cfg.TEST.NO_TEST
        with from_streams(self.first_streams):  # a resumed training has the views that it began with
            self.train_loader_x = cache_views(
                self.train_loader_x,
                min(views, epochs),
                self._kept(),
                self.cfg,
                self._feature_cache(),
                self.clip.image,
                draws_between=int(validates),
            )

    @torch.no_grad()
    def _look(self) -> Iterator[Step]:
        """Go once through the training pictures in the data set's order, without learning."""
        for batch in in_order(self.train_loader_x):
            images, labels = self.parse_batch_train(batch)
            with self.precision.autocast():
                yield self.model.step(images, labels)

    def before_epoch(self) -> None:
        """Turn to the next cached view."""
        if isinstance(self.train_loader_x, ReplayLoader):
            self.train_loader_x.turn_to(self.epoch)

    def _encode_frozen(self, images: Tensor) -> Tensor:
        with self.precision.autocast():
            return self.encode_images(images.to(self.device, non_blocking=True))

    def _feature_cache(self) -> FeatureCache | None:
        """Return where image features are kept on disk, or None where that is off or can't be.

        Raises:
            ConfigError: the config asks for it, but the method changes the image features.
        """
        if self.model.image_is_frozen:
            # A learner of a plugin that encodes in its own way may give other features for the same weights.
            own = type(self.model).encode_images.__module__.partition(".")[0] != "promptmix"
            return None if own else open_cache(self.cfg)
        source = source_of(self.cfg, "INPUT.FEATURE_CACHE")
        if self.cfg.INPUT.FEATURE_CACHE and source:
            raise ConfigError(
                f"INPUT.FEATURE_CACHE is True (set by {source}), but {self.cfg.TRAINER.NAME} trains the image side, "
                "so features can't be kept; set it to False or leave it out"
            )
        return None

    def _kept(self) -> Kept:
        return kept_of(self, own=type(self).encode_images is not PromptTrainer.encode_images)

    @contextmanager
    def _features_of(self, split: str | None) -> Iterator[None]:
        """Have the evaluation of ``split`` read image features instead of pictures, where they may be kept."""
        cache = self._feature_cache()
        part = "val" if (split or self.cfg.TEST.SPLIT) == "val" and self.val_loader is not None else "test"
        loader = getattr(self, f"{part}_loader")
        if cache is not None:
            found = feature_loader(loader, self._kept(), self.cfg, cache, self.clip.image, part)
            setattr(self, f"{part}_loader", found or loader)
        try:
            yield
        finally:
            setattr(self, f"{part}_loader", loader)

    def run_epoch(self) -> None:
        """Go once through the labelled data.

        Raises:
            UserError: memory does not suffice; the message names the settings that help, and by how much.
        """
        if not any(self._optims.values()):
            return  # what there is to learn was taken from the pictures by prepare()
        with explained(self):
            super().run_epoch()
        if self.average is None:
            return
        self.average.update(self.model, self.epoch + 1)
        if self.epoch + 1 == self.max_epoch:
            get_logger().info("Using the Gaussian-weighted average of %d epochs", self.max_epoch)
            self.average.write_to(self.model)

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Learn from one batch.

        Returns:
            What the log line shows: loss, accuracy of the batch in percent (where there are labels), and the parts of the loss.
        """
        images, labels = self.parse_batch_train(batch)
        optimizers = [optim for optim in self._optims.values() if optim is not None]
        compiled = self._compiled = compiled_step(self.cfg, self.model, optimizers, self._compiled)
        with self.precision.autocast():
            self.stages.turn_to(self.epoch * self.num_batches + self.batch_idx)
            given = None if self.unlabeled else labels
            terms = self.model.loss(self.model.step(images, given)) if compiled is None else compiled.loss(images, given)
        self.precision.backward_and_update(
            terms.total,
            optimizers,
            clip_norm=self.cfg.TRAIN.CLIP_GRAD_NORM,
            backward=lambda loss: self.take_gradients(loss, terms),
            update=None if compiled is None else compiled.update,
        )
        if self.schedule_unit == "step" or self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        parts = {name: value.detach() for name, value in terms.parts.items()}
        accuracy = {} if self.unlabeled else {"acc": compute_accuracy(terms.logits, labels)[0]}
        return {"loss": terms.total.detach(), **accuracy, **parts}

    def take_gradients(self, loss: Tensor, terms: LossTerms) -> None:
        """Put gradients into the learned tensors.

        Args:
            loss: what is propagated: ``terms.total``, scaled where the precision scales losses.
            terms: of the batch.
        """
        self.model_backward(loss)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return image features, without gradient where the image side is frozen; kept features are passed on."""
        return self.model.features(images)

    def parse_batch_train(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images and labels (B,) on the device.

        Images are (B, 3, S, S), with several views of each (V, B, 3, S, S), or cached features (B, D).
        """
        given = batch["img"]
        views = [view.to(self.device, non_blocking=True) for view in (given if isinstance(given, list) else [given])]
        images = views[0] if len(views) == 1 else torch.stack(views)
        return images, batch["label"].to(self.device, non_blocking=True)

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load learned tensors from a run's output folder: ours, converted, or written by the authors' code of this method.

        Raises:
            CheckpointError: no such checkpoint, or it is of another method, config or backbone.
        """
        theirs = convert.find_theirs(directory, self.cfg.TRAINER.NAME, epoch) if directory else None
        if theirs is None:
            super().load_model(directory, epoch)
            return
        theirs.models = {name: state for name, state in theirs.models.items() if name in self._models}
        convert.check_backbone(theirs, self.clip.image.visual)
        for name, model in self._models.items():
            if name in theirs.models:
                load_state_dict_strict(model, theirs.models[name], theirs.source)
            elif any(True for _ in model.parameters()):  # averages of weights only matter to training that goes on
                raise CheckpointError(f"{theirs.source} holds nothing for {name}, which this config also trains")
        get_logger().info("Load %s of the authors' code (epoch=%s)", theirs.source, theirs.epoch)

    def can_do_without(self, directory: str, name: str, epoch: int | None) -> bool:
        """Tell whether a model that nobody registered holds what the frozen image tower has anyway (layer norms not trained)."""
        if self.layout is None:
            return False
        state = read_model(Path(directory, name), epoch)[0]["state_dict"]
        return convert.is_frozen(convert.Learned(type(self).__name__, {name: state}, directory), self.clip.image.visual)

    def test(self, split: str | None = None) -> float:
        """Evaluate, encoding the text side once."""
        with self._evaluating(split):
            return super().test(split)

    @torch.no_grad()
    def scores(self, split: str) -> tuple[Tensor, Tensor]:
        """Return class scores (N, C) and labels (N,) of the part ``val`` or ``test``, in its order, on the CPU."""
        self.set_model_mode("eval")
        found: list[tuple[Tensor, Tensor]] = []
        with self._evaluating(split):
            for batch in self.val_loader if split == "val" and self.val_loader is not None else self.test_loader:
                images, labels = self.parse_batch_test(batch)
                found.append((self.model_inference(images).cpu(), labels.cpu()))
        return torch.cat([scores for scores, _ in found]), torch.cat([labels for _, labels in found])

    @contextmanager
    def _evaluating(self, split: str | None) -> Iterator[None]:
        """Encode the text side once, and read kept image features, in the context."""
        self._testing, self._classifier = True, None
        try:
            with self._features_of(split), explained(self):
                yield
        finally:
            self._testing, self._classifier = False, None

    def score_batch(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Give the evaluator the class scores and, where it ranks base against new pictures, the method's own base scores."""
        if not isinstance(self.evaluator, OpenWorld):
            return super().score_batch(inputs, labels)
        with self.precision.autocast():
            features = self.encode_images(inputs)
        logits = self.model_inference(features)
        with self.precision.autocast():
            self.evaluator.process(logits, labels, self.model.base_scores(features, self._classifier))
        return logits

    def model_inference(self, input: Tensor) -> Tensor:
        """Return class scores (B, C) in float32 for images (B, 3, S, S)."""
        with self.precision.autocast():
            if self._classifier is None or not self._testing:
                self._classifier = self.model.classifier()
            given = input if self.model.routes_first else self.encode_images(input)
            logits, routing = self.model.infer(given, self._classifier)
        self._routing = routing if self._testing else None
        return logits.float()

    def kept_beside_scores(self) -> dict[str, Tensor]:
        """Return the routing of the last batch: ``expert`` and ``expert_weight`` (B, K), ``router_logit`` (B, E)."""
        found = self._routing
        return {} if found is None else {"expert": found.experts, "expert_weight": found.weights, "router_logit": found.logits}
