"""The loop on a toy: hooks in order, Dassl's lines, resume, model selection, evaluation alone, clear refusals."""

import gc
import re
import shutil
from multiprocessing import active_children

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from promptmix import hookimpl
from promptmix.config import get_cfg_default
from promptmix.data import DATASET_REGISTRY, DatasetBase, Datum
from promptmix.engine import (
    TRAINER_REGISTRY,
    TrainerBase,
    TrainerX,
    TrainerXU,
    build_lr_scheduler,
    build_optimizer,
    build_trainer,
    compute_accuracy,
    load_checkpoint,
)
from promptmix.engine.log import LazyWriter
from promptmix.errors import CheckpointError, ConfigError, RegistryError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.utils import set_random_seed


class ToyTrainer(TrainerX):
    """Tells dark from light pictures with one linear layer."""

    def build_model(self):
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, self.num_classes)).to(self.device)
        self.optim = build_optimizer(self.model, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("linear", self.model, self.optim, self.sched)

    def forward_backward(self, batch):
        image, label, _ = self.parse_batch_train(batch)
        output = self.model(image)
        loss = F.cross_entropy(output, label)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss, "acc": compute_accuracy(output, label)[0].item()}


class ToyPairs(ToyTrainer, TrainerXU):
    """Sees unlabelled pictures beside the labelled ones, and remembers which."""

    run_epoch = TrainerXU.run_epoch
    parse_batch_train = TrainerXU.parse_batch_train

    def forward_backward(self, batch_x, batch_u):
        image, label, image_u = self.parse_batch_train(batch_x, batch_u)
        self.seen = [*getattr(self, "seen", []), (batch_x["index"].tolist(), batch_u["index"].tolist())]
        assert image_u.shape[1:] == image.shape[1:]
        self.model_backward_and_update(F.cross_entropy(self.model(image), label))


class Recorder:
    """A plugin that writes down every event."""

    def __init__(self):
        self.events, self.scalars = [], []

    @hookimpl
    def before_train(self, trainer):
        self.events.append(f"before_train {trainer.start_epoch}")

    @hookimpl
    def after_epoch(self, trainer):
        self.events.append(f"after_epoch {trainer.epoch}")

    @hookimpl
    def after_test(self, trainer, split, results):
        self.events.append(f"after_test {split}")
        results["extra"] = 1.0

    @hookimpl
    def after_train(self, trainer):
        self.events.append("after_train")

    @hookimpl
    def log_scalar(self, trainer, tag, value, step):
        self.scalars.append((tag, value, step))


@pytest.fixture
def recorder():
    manager = get_plugin_manager()
    plugin = Recorder()
    manager.register(plugin)
    yield plugin
    manager.unregister(plugin)


@pytest.fixture
def cfg(tmp_path):
    items = []
    for n in range(20):
        path = tmp_path / "pictures" / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (n, n, n) if n % 2 else (255 - n, 255, 250)).save(path)
        items.append(Datum(str(path), n % 2, 0, ("light", "dark")[n % 2]))

    class ToyPngs(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=items, train_u=items[:6], val=items[:4], test=items)

    DATASET_REGISTRY.register(ToyPngs, force=True)
    TRAINER_REGISTRY.register(ToyTrainer, force=True)
    TRAINER_REGISTRY.register(ToyPairs, force=True)
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DEVICE = "cpu"
    cfg.DATASET.NAME, cfg.TRAINER.NAME = "ToyPngs", "ToyTrainer"
    cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS = (8, 8), ("normalize",)
    cfg.INPUT.PIXEL_MEAN = cfg.INPUT.PIXEL_STD = [0.5, 0.5, 0.5]
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 4
    cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH = "sgd", 0.02, 3
    cfg.OPTIM.LR_SCHEDULER, cfg.OPTIM.WARMUP_EPOCH, cfg.OPTIM.WARMUP_TYPE = "cosine", 1, "constant"
    cfg.TRAIN.PRINT_FREQ = 2
    yield cfg
    for registry, name in ((DATASET_REGISTRY, "ToyPngs"), (TRAINER_REGISTRY, "ToyTrainer"), (TRAINER_REGISTRY, "ToyPairs")):
        registry._entries.pop(name)


def build(cfg, seed=1):
    set_random_seed(seed)
    return build_trainer(cfg)


LINE = re.compile(
    r"epoch \[(\d)/3\] batch \[(\d)/5\] time \d+\.\d{3} \(\d+\.\d{3}\) data \d+\.\d{3} \(\d+\.\d{3}\) "
    r"loss \d+\.\d{4} \(\d+\.\d{4}\) acc \d+\.\d{4} \(\d+\.\d{4}\) lr (\d\.\d{4}e-\d\d) eta \d+:\d\d:\d\d"
)


def test_training_learns_and_prints_dassls_lines(cfg, capsys):
    trainer = build(cfg)
    trainer.train()
    assert trainer.last_results["test"]["accuracy"] == 100
    out = capsys.readouterr().out
    lines = [LINE.fullmatch(line) for line in out.splitlines() if line.startswith("epoch")]
    # Every second batch; the rate changes with an epoch's last batch, of which there is no line here.
    assert [line.groups() for line in lines] == [
        ("1", "2", "1.0000e-05"),
        ("1", "4", "1.0000e-05"),
        ("2", "2", "2.0000e-02"),
        ("2", "4", "2.0000e-02"),
        ("3", "2", "1.5000e-02"),
        ("3", "4", "1.5000e-02"),
    ]
    rest = [line for line in out.splitlines() if not line.startswith(("epoch", "+", "-", "#", "Dataset", "Building"))]
    directory = cfg.OUTPUT_DIR
    assert rest[:3] == ["Loading trainer: ToyTrainer", "Loading dataset: ToyPngs", "Loading evaluator: Classification"]
    assert rest[3:9] == [
        "No checkpoint found, train from scratch",
        f"Initialize tensorboard (log_dir={directory}/tensorboard)",
        f"Checkpoint saved to {directory}/linear/model.pth.tar-3",
        "Finish training",
        "Deploy the last-epoch model",
        "Evaluate on the *test* set",
    ]
    assert rest[9:14] == ["=> result", "* total: 20", "* correct: 20", "* accuracy: 100.0%", "* error: 0.0%"]
    assert re.fullmatch(r"Elapsed: \d:\d\d:\d\d", rest[-1])


def test_few_batches_print_every_one(cfg, capsys):
    cfg.TRAIN.PRINT_FREQ = 10
    cfg.OPTIM.MAX_EPOCH = 1
    build(cfg).train()
    assert capsys.readouterr().out.count("epoch [1/1] batch") == 5


def test_hooks_fire_in_order(cfg, recorder):
    build(cfg).train()
    assert recorder.events == [
        "before_train 0",
        "after_epoch 0",
        "after_epoch 1",
        "after_epoch 2",
        "after_test test",
        "after_train",
    ]
    tags = [tag for tag, _, _ in recorder.scalars]
    assert tags[:3] == ["train/loss", "train/acc", "train/lr"]
    assert [step for tag, _, step in recorder.scalars if tag == "train/lr"] == list(range(15))
    assert ("test/accuracy", 100.0, 2) in recorder.scalars
    assert ("test/extra", 1.0, 2) in recorder.scalars
    assert all(isinstance(value, float) for _, value, _ in recorder.scalars)


def test_after_train_fires_when_training_fails(cfg, recorder):
    trainer = build(cfg)
    trainer.forward_backward = lambda batch: trainer.model_backward(torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        trainer.train()
    assert recorder.events == ["before_train 0", "after_train"]
    assert trainer._writer is None


def test_scalars_reach_tensorboard(cfg):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    build(cfg).train()
    events = EventAccumulator(f"{cfg.OUTPUT_DIR}/tensorboard")
    events.Reload()
    assert {"train/loss", "train/acc", "train/lr", "test/accuracy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/lr")] == list(range(15))
    assert events.Scalars("test/accuracy")[0].value == 100


def test_evaluation_alone_makes_no_files(cfg, tmp_path):
    build(cfg).test()
    assert not (tmp_path / "out").exists()


def test_writer_is_made_at_first_use(tmp_path):
    writer = LazyWriter(str(tmp_path / "tb"))
    writer.close()
    assert not (tmp_path / "tb").exists()
    writer.add_scalar("a", 1.0, 0)
    writer.close()
    assert len(list((tmp_path / "tb").iterdir())) == 1


def test_resumed_run_ends_where_an_unbroken_one_does(cfg, tmp_path, capsys):
    # Whole batches in a fixed order, so that only model, optimizer and schedule decide the end.
    cfg.DATALOADER.TRAIN_X.SAMPLER = "SequentialSampler"
    cfg.OPTIM.MAX_EPOCH = 4
    whole = build(cfg)
    whole.train()

    cfg.OUTPUT_DIR = str(tmp_path / "broken")
    cfg.TRAIN.CHECKPOINT_FREQ = 2
    first = build(cfg)

    class Stop(Exception):
        pass

    def stop():
        if first.epoch == 2:
            raise Stop

    first.before_epoch = stop
    with pytest.raises(Stop):
        first.train()

    second = build(cfg, seed=9)
    capsys.readouterr()
    second.train()
    out = capsys.readouterr().out
    assert f"Found checkpoint at {cfg.OUTPUT_DIR} (will resume training)" in out
    assert "Previous epoch: 2" in out
    assert "epoch [1/4]" not in out
    assert "epoch [3/4]" in out
    assert torch.equal(whole.model[1].weight, second.model[1].weight)
    assert whole.sched.state_dict() == second.sched.state_dict()


def test_resume_from_a_named_folder(cfg, tmp_path):
    build(cfg).train()
    first = cfg.OUTPUT_DIR
    cfg.OUTPUT_DIR, cfg.RESUME, cfg.OPTIM.MAX_EPOCH = str(tmp_path / "more"), first, 5
    trainer = build(cfg)
    trainer.train()
    assert trainer.start_epoch == 3
    assert load_checkpoint(tmp_path / "more" / "linear" / "model.pth.tar-5")["scheduler"]["last_epoch"] == 5
    cfg.RESUME = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nothing to resume in .*nowhere"):
        build(cfg).train()


def test_best_model_is_kept_and_deployed(cfg, tmp_path, recorder, capsys):
    cfg.TEST.FINAL_MODEL = "best_val"
    trainer = build(cfg)
    results = iter([60.0, 90.0, 70.0])
    evaluate = trainer.test
    trainer.test = lambda split=None: next(results) if split == "val" else evaluate(split)
    trainer.train()
    assert trainer.best_result == 90
    best = load_checkpoint(tmp_path / "out" / "linear" / "model-best.pth.tar")
    assert (best["epoch"], best["val_result"], best["trainer"]) == (2, 90.0, "ToyTrainer")
    out = capsys.readouterr().out
    assert "Deploy the model with the best val performance" in out
    assert "model-best.pth.tar to linear (epoch=2, val_result=90.0)" in out

    # A run that goes on must not take a worse model for the best.
    cfg.OPTIM.MAX_EPOCH = 4
    more = build(cfg)
    more.test = lambda split=None: 80.0
    more.train()
    assert more.best_result == 90


def test_validation_is_used_each_epoch(cfg, recorder):
    cfg.TEST.FINAL_MODEL = "best_val"
    build(cfg).train()
    assert recorder.events[1:3] == ["after_test val", "after_epoch 0"]
    assert recorder.events[-2:] == ["after_test test", "after_train"]


def test_saved_model_evaluates_the_same(cfg, capsys):
    trained = build(cfg)
    trained.train()
    fresh = build(cfg, seed=5)
    fresh.load_model(cfg.OUTPUT_DIR, epoch=3)
    assert fresh.test(split="val") == 100
    assert fresh.last_results["val"]["accuracy"] == 100
    assert torch.equal(fresh.model[1].weight, trained.model[1].weight)
    assert "model.pth.tar-3 to linear (epoch=3, val_result=none)" in capsys.readouterr().out
    fresh.load_model("")
    assert "load_model() is skipped" in capsys.readouterr().out


def test_models_of_others_are_refused(cfg):
    trained = build(cfg)
    trained.train()
    with pytest.raises(CheckpointError, match="no checkpoint .*tar-7; the folder holds checkpoint, model.pth.tar-3"):
        trained.load_model(cfg.OUTPUT_DIR, epoch=7)

    class OtherTrainer(ToyTrainer):
        def build_model(self):
            self.model = nn.Linear(2, 2)
            self.register_model("linear", self.model)

    with pytest.raises(CheckpointError, match=r"written by ToyTrainer\) doesn't fit Linear.*lacks weight.*another method"):
        OtherTrainer(cfg).load_model(cfg.OUTPUT_DIR, epoch=3)


def test_no_test_and_no_models(cfg, capsys):
    cfg.TEST.NO_TEST = True
    build(cfg).train()
    assert "Evaluate" not in capsys.readouterr().out

    class Frozen(ToyTrainer):
        def build_model(self):
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))

    frozen = Frozen(cfg)
    assert frozen.resume_model_if_exist(cfg.OUTPUT_DIR) == 0
    assert frozen.get_current_lr() == 0
    assert 0 <= frozen.test() <= 100


def test_gradient_clipping_limits_the_step(cfg):
    cfg.TRAIN.CLIP_GRAD_NORM = 1e-3
    trainer = build(cfg)
    trainer.model_zero_grad()
    trainer.model_backward(trainer.model(torch.ones(2, 3, 8, 8)).square().sum())
    trainer.model_update()
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("count", "batches"), [("train_x", 5), ("train_u", 3), ("smaller_one", 3)])
def test_labelled_and_unlabelled_together(cfg, count, batches):
    cfg.TRAINER.NAME, cfg.TRAIN.COUNT_ITER, cfg.OPTIM.MAX_EPOCH = "ToyPairs", count, 1
    cfg.DATALOADER.TRAIN_U.SAME_AS_X = False
    cfg.DATALOADER.TRAIN_U.BATCH_SIZE = 2
    cfg.DATALOADER.TRAIN_U.SAMPLER = "SequentialSampler"
    trainer = build(cfg)
    trainer.train()
    unlabelled = [u for _, u in trainer.seen]
    assert unlabelled == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]][:batches]


@pytest.mark.parametrize("count", ["train_x", "train_u"])
def test_pairs_are_the_same_from_workers_that_stay(cfg, count):
    cfg.TRAINER.NAME, cfg.TRAIN.COUNT_ITER = "ToyPairs", count
    cfg.INPUT.TRANSFORMS, cfg.DATALOADER.NUM_WORKERS = ("random_resized_crop", "random_flip", "normalize"), 2
    cfg.OPTIM.MAX_EPOCH, seen = 2, []
    for stay in (False, True):
        cfg.DATALOADER.PERSISTENT_WORKERS = stay
        trainer = build(cfg)
        shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
        trainer.train()
        seen.append((trainer.seen, trainer.model[1].weight.detach(), torch.get_rng_state()))
        assert not active_children()
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(plain, staying) for plain, staying in zip(seen[0][1:], seen[1][1:], strict=True))


def test_workers_end_when_training_is_broken_off(cfg):
    cfg.DATALOADER.NUM_WORKERS = 2
    trainer = build(cfg)
    learn = trainer.forward_backward

    def broken_off(batch):
        if trainer.epoch == 1:
            assert len(active_children()) == 2
            raise KeyboardInterrupt
        return learn(batch)

    trainer.forward_backward = broken_off
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    gc.collect()  # the error holds the epoch that it came from
    assert not active_children()


def test_pairs_need_unlabelled_data_and_a_known_count(cfg):
    cfg.TRAINER.NAME = "ToyPairs"
    trainer = build(cfg)
    trainer.train_loader_u = None
    with pytest.raises(ConfigError, match="ToyPairs needs unlabelled data"):
        trainer.train()
    cfg.TRAIN.COUNT_ITER = "all"
    with pytest.raises(ConfigError, match="COUNT_ITER is 'all'.*smaller_one"):
        build(cfg).train()


def test_unknown_trainer_lists_choices(cfg):
    cfg.TRAINER.NAME = "ToyTrainr"
    with pytest.raises(RegistryError, match="unknown trainer 'ToyTrainr'; did you mean 'ToyTrainer'"):
        build_trainer(cfg)


def test_models_are_registered_once_and_known_by_name():
    class Early(TrainerBase):
        def __init__(self):
            self.register_model("a", nn.Linear(1, 1))

    with pytest.raises(AttributeError, match="super"):
        Early()
    trainer = TrainerBase()
    trainer.register_model("a", nn.Linear(1, 1))
    with pytest.raises(ValueError, match="two models are registered as 'a'"):
        trainer.register_model("a", nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no model is registered as 'b' .there are: a"):
        trainer.set_model_mode("eval", "b")
    with pytest.raises(ValueError, match="got no model"):
        trainer.register_model("c")
    trainer.set_model_mode("eval", ["a"])
    assert not trainer._models["a"].training
    with pytest.raises(KeyError, match="train, test or eval"):
        trainer.set_model_mode("off")
