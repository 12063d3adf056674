import os
import pickle

import numpy as np
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.utils import listdir_nohidden, mkdir_if_missing
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}


@DATASET_REGISTRY.register()
class OxfordPets(DatasetBase):
    """Squares in three colours, under a name that promptmix has too."""

    dataset_dir = "squares"

    def __init__(self, cfg):
        self.dataset_dir = os.path.join(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)), self.dataset_dir)
        mkdir_if_missing(self.dataset_dir)
        if not listdir_nohidden(self.dataset_dir):
            self.draw()
        train, test = self.read("train"), self.read("test")
        preprocessed = os.path.join(self.dataset_dir, f"shot_{cfg.DATASET.NUM_SHOTS}-seed_{cfg.SEED}.pkl")
        if os.path.exists(preprocessed):
            with open(preprocessed, "rb") as file:
                train = pickle.load(file)["train"]
        else:
            train = self.generate_fewshot_dataset(train, num_shots=cfg.DATASET.NUM_SHOTS)
            with open(preprocessed, "wb") as file:
                pickle.dump({"train": train}, file, protocol=pickle.HIGHEST_PROTOCOL)
        super().__init__(train_x=train, val=test, test=test)

    def draw(self):
        random = np.random.RandomState(0)
        for name, colour in COLOURS.items():
            for split, count in (("train", 6), ("test", 3)):
                for i in range(count):
                    noise = random.randint(-30, 30, (8, 8, 3))
                    pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(os.path.join(self.dataset_dir, f"{name}_{split}_{i}.png"))

    def read(self, split):
        names = list(COLOURS)
        items = []
        for file in listdir_nohidden(self.dataset_dir, sort=True):
            name, *rest = file.split("_")
            if rest and rest[0] == split:
                items.append(Datum(impath=os.path.join(self.dataset_dir, file), label=names.index(name), classname=name))
        return items
