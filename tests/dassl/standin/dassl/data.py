import logging

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

logging.disable(logging.WARNING)  # as importing the real one does


class Datum:
    def __init__(self, impath, label, classname, domain=0):
        self.impath, self.label, self.classname, self.domain = impath, label, classname, domain


class OxfordPets:
    """Pictures of the toy room under a name that promptmix has templates for; no templates, no class names of the other half."""

    def __init__(self, cfg):
        names = ["barn owl", "pine_tree", "red double decker bus"]
        root = f"{cfg.DATASET.ROOT}/toy"
        self.train_x = [Datum(f"{root}/train-{label}-{i}.png", label, name) for label, name in enumerate(names) for i in range(4)]
        self.test = [Datum(f"{root}/test-{label}-{i}.png", label, name) for label, name in enumerate(names) for i in range(2)]
        self.val = None
        self.classnames, self.lab2cname, self.num_classes = names, dict(enumerate(names)), len(names)


class DatasetWrapper(Dataset):
    def __init__(self, data_source, size):
        self.data_source, self.size = data_source, size
        self.transform, self.k_tfm, self.return_img0 = self.read, 1, False

    def read(self, picture):
        pixels = np.asarray(picture.resize(self.size), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def __len__(self):
        return len(self.data_source)

    def __getitem__(self, index):
        item = self.data_source[index]
        img = self.transform(Image.open(item.impath).convert("RGB"))
        return {"img": img, "label": item.label, "domain": item.domain, "impath": item.impath, "index": index}


class DataManager:
    built = 0

    def __init__(self, cfg):
        type(self).built += 1
        self.dataset = OxfordPets(cfg)
        size = tuple(cfg.INPUT.SIZE)
        batch = cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        self.train_loader_x = DataLoader(DatasetWrapper(self.dataset.train_x, size), batch, shuffle=True, drop_last=True)
        self.train_loader_u = self.val_loader = None
        self.test_loader = DataLoader(DatasetWrapper(self.dataset.test, size), 8)
        self.num_classes, self.lab2cname = self.dataset.num_classes, self.dataset.lab2cname
        self.num_source_domains = 0
