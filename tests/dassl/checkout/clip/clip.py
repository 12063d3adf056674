"""A text and an image encoder so small that they stand for CLIP in a second."""

import torch
from torch import nn

_MODELS = {"Tiny": "https://example.invalid/tiny.pt"}


def _download(url, root=None):
    raise RuntimeError("the tests are offline")


class Tiny(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.visual = nn.Linear(3, 4, bias=False)
        self.words = nn.Embedding(128, 4)
        self.load_state_dict(state)

    def encode_image(self, image):
        return self.visual(image.mean(dim=(2, 3)))

    def encode_text(self, text):
        return self.words(torch.tensor([ord(letter) for letter in text])).mean(0)


def load(name):
    return Tiny(torch.load(_download(_MODELS[name]), map_location="cpu"))
