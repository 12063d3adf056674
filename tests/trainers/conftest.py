"""The room that tests of trainers share."""

from __future__ import annotations

import pytest

from promptmix.registry import DATASET_REGISTRY
from tests.trainers import toy


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    """A folder with the toy pictures and the random backbone, which are registered as long as the tests run."""
    folder = tmp_path_factory.mktemp("toy")
    toy.draw(folder / "toy")
    toy.write_backbone(folder / "clip.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASET_REGISTRY._entries, "ToyPictures", toy.ToyPictures)
        yield folder
