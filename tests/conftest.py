"""Tests run offline and on one thread: fast on a small machine, and the same numbers everywhere."""

import contextlib
import ctypes
import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what the process that started them has
    from tests.tidy import own_folder

    _FOLDER = own_folder()
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Continuous integration draws the same examples each time; a run by hand draws others, and so finds more.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def backbones_once():
    """Build each small backbone once a process, for trainings in it."""
    import promptmix.prompts.trainer
    from promptmix.plugin_manager import get_plugin_manager
    from tests.backbones import Kept

    get_plugin_manager()
    gc.collect()
    gc.freeze()  # what was imported; every run collects, which takes a quarter of a second otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promptmix.prompts.trainer, "load_clip", Kept(promptmix.prompts.trainer.load_clip))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_emoji():
    """Test on two pictures of each class of the embedded data sets (``tests/few.py``)."""
    from tests import few

    with pytest.MonkeyPatch.context() as patch:
        yield few.few_emoji(patch)


@pytest.fixture(scope="module")
def all_emoji(few_emoji):
    """The embedded data sets whole, for tests of themselves."""
    few_emoji.off = True
    yield
    few_emoji.off = False


@pytest.fixture(scope="module", autouse=True)
def tidy():
    """Give back what a module's tests held: compiled graphs, cycles of models, and pages that the allocator keeps.

    What is left (half a million objects of imported libraries) need not be looked through again: a collection takes a fifth of a
    second otherwise, and every run makes one.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    """A folder with the toy pictures and the random backbone, which are registered as long as the tests run."""
    from promptmix.registry import DATASET_REGISTRY
    from tests.trainers import toy

    folder = tmp_path_factory.mktemp("toy")
    toy.draw(folder / "toy")
    toy.write_backbone(folder / "clip.safetensors")
    toy.write_backbone(folder / "flat.safetensors", layers=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASET_REGISTRY._entries, "ToyPictures", toy.ToyPictures)
        yield folder


@pytest.fixture
def dots(tmp_path):
    """The start of a command that trains a small method on four grey squares into tmp_path/out."""
    from tests.dots import command

    return command(tmp_path)
