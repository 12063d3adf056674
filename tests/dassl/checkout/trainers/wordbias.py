import os.path as osp

import torch
import torch.nn as nn
from clip import clip
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint, load_pretrained_weights
from torch.cuda.amp import GradScaler
from torch.nn import functional as F


class PromptLearner(nn.Module):
    def __init__(self, classnames, clip_model):
        super().__init__()
        self.ctx = nn.Parameter(torch.zeros(len(classnames), 4))
        with torch.no_grad():
            embedding = torch.stack([clip_model.encode_text(name) for name in classnames])
        self.register_buffer("token_prefix", embedding)

    def forward(self):
        return self.token_prefix + self.ctx


class CustomCLIP(nn.Module):
    def __init__(self, classnames, clip_model):
        super().__init__()
        self.prompt_learner = PromptLearner(classnames, clip_model)
        self.image_encoder = clip_model.encode_image
        self.scale = torch.ones(()).cuda() * 5

    def forward(self, image):
        return self.scale * self.image_encoder(image) @ self.prompt_learner().t()


@TRAINER_REGISTRY.register()
class CoOp(TrainerX):
    """Under a name that promptmix has too."""


@TRAINER_REGISTRY.register()
class WordBias(TrainerX):
    def check_cfg(self, cfg):
        assert cfg.TRAINER.WORDBIAS.PREC in ["fp16", "fp32", "amp"]

    def build_model(self):
        cfg = self.cfg
        print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME})")
        clip_model = clip.load(cfg.MODEL.BACKBONE.NAME)
        if cfg.TRAINER.WORDBIAS.PREC == "fp16":
            raise RuntimeError("fp16 needs a GPU")
        clip_model.half()
        self.model = CustomCLIP(self.dm.dataset.classnames, clip_model)
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(self.model.prompt_learner, cfg.MODEL.INIT_WEIGHTS)
        self.model.to(self.device)
        self.optim = build_optimizer(self.model.prompt_learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)
        self.scaler = GradScaler() if cfg.TRAINER.WORDBIAS.PREC == "amp" else None

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        output = self.model(image)
        loss = F.cross_entropy(output, label)
        self.model_backward_and_update(loss)
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "acc": compute_accuracy(output, label)[0].item()}

    def parse_batch_train(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def load_model(self, directory, epoch=None):
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        for name in self.get_model_names():
            path = osp.join(directory, name, "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}")
            checkpoint = load_checkpoint(path)
            state_dict = checkpoint["state_dict"]
            state_dict.pop("token_prefix", None)
            print("Loading weights to {} from {} (epoch = {})".format(name, path, checkpoint["epoch"]))
            self._models[name].load_state_dict(state_dict, strict=False)


@TRAINER_REGISTRY.register()
class OwnTest(WordBias):
    """Tests in its own way, and wants a GPU where asked to."""

    @torch.no_grad()
    def test(self, split=None):
        self.set_model_mode("eval")
        self.evaluator.reset()
        for batch in self.test_loader:
            image, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(image), label)
        results = self.evaluator.evaluate()
        for name, value in results.items():
            self.write_scalar(f"test/{name}", value, self.epoch)
        return list(results.values())[0]


@TRAINER_REGISTRY.register()
class NeedsGPU(WordBias):
    def forward_backward(self, batch):
        torch.cuda.current_device()
        return super().forward_backward(batch)


@TRAINER_REGISTRY.register()
class NeedsFork(WordBias):
    def forward_backward(self, batch):
        return self.fork_backward_and_update(batch)
