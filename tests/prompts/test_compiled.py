"""A compiled step: one graph forward, one backward, one for the optimizer, and the numbers of the eager step."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from promptmix.bench.world import World
from promptmix.errors import ConfigError
from promptmix.prompts.learner import Learner
from tests.trainers.toy import shallow, toy_trainer

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="older compilers trace less, and a step says so in one line",
)

SHALLOW = {
    "CoOp": [],
    "CoCoOp": [],
    "MoCoOp": [],
    "MaPLe": ["TRAINER.MAPLE.PROMPT_DEPTH", 2],
    "PromptSRC": ["TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", 2, "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", 2],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Towers of two layers, since capturing a graph takes a second for each."""
    return shallow(World("tiny-vit", tmp_path_factory.mktemp("world"), "cpu"))


@pytest.fixture
def captured(monkeypatch):
    """Have graphs captured, differentiated and run, but not handed to a C++ compiler, which would take a minute; returns them."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    compile_ = torch.compile
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: compile_(f, backend=backend, **options))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def flat_world(tmp_path_factory):
    """Towers of one layer, for methods that do nothing of their own in the second."""
    return shallow(World("tiny-vit", tmp_path_factory.mktemp("world"), "cpu"), 1)


def train(world, name, *opts, epochs=3):
    """Learn from one batch in each of a few epochs; return the trainer, what it showed and what it learned."""
    trainer = world.trainer(name, 6, *SHALLOW[name], *opts, experts=2)
    batch, shown = world.batch(trainer, 4), []
    trainer.num_batches = 1
    for trainer.epoch in range(epochs):
        shown.append({name: float(value) for name, value in trainer.forward_backward(batch).items()})
    return trainer, shown, [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize(("factor", "off"), [(2.0, "1"), (float("nan"), "nan")])
def test_a_compiler_that_errs_is_refused_at_the_first_batch(monkeypatch, flat_world, factor, off):
    def wrong(graph, inputs):
        return make_boxed_func(lambda *args: [None if part is None else factor * part for part in graph(*args)])

    compile_, backend = torch.compile, aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=wrong)
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: compile_(f, backend=backend, **options))
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=rf"wrong gradients .* \(they differ by {off} of the largest\); set"):
        train(flat_world, "CoOp", "TRAIN.STEP", "compiled", epochs=1)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SHALLOW)
def test_the_whole_step_is_one_graph_each_way(request, captured, name):
    """CoOp's with another optimizer, clipped gradients, and a rate that changes: it is no new graph, and stays a number."""
    opts = ["OPTIM.NAME", "adam", "OPTIM.LR_SCHEDULER", "cosine", "OPTIM.MAX_EPOCH", 4, "TRAIN.CLIP_GRAD_NORM", 0.5]
    opts = opts if name == "CoOp" else []
    world = request.getfixturevalue("flat_world" if name in ("CoCoOp", "MoCoOp") else "world")
    eager, shown, learned = train(world, name, *opts)
    compiled, shown_too, learned_too = train(world, name, *opts, "TRAIN.STEP", "compiled")
    kinds = ["backward" if any("tangents" in node.name for node in graph.graph.nodes) else "other" for graph in captured]
    # Forward, backward, and Adam's clipping and update, or SGD's update twice: its first step makes the momentum.
    assert kinds == ["other", "backward", "other", "other"]
    assert type(compiled._optims["prompt_learner"].param_groups[0]["lr"]) is float
    assert compiled.get_current_lr() == eager.get_current_lr()
    assert (eager.get_current_lr() < 0.002) == (name == "CoOp")
    for before, after in zip(shown, shown_too, strict=True):
        assert before == pytest.approx(after, rel=2e-4, abs=1e-5)
    for before, after in zip(learned, learned_too, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3 if opts else 1e-4, atol=1e-5)
    called = {str(node.target) for graph in captured for node in graph.graph.nodes}
    assert not any(name in target for name in ("_local_scalar_dense", "nonzero", "unique", "_to_copy") for target in called)


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("CoOp", ["TRAIN.STEP", "cuda_graph"], "TRAIN.STEP is 'cuda_graph', but this run computes on a CPU"),
        ("CoOp", ["TRAIN.STEP", "compiled", "MODEL.COMPILE", True], "leave one of them out"),
        ("CoOp", ["TRAIN.STEP", "compiled", "MODEL.CLASS_CHUNK", 2], "MODEL.CLASS_CHUNK is 2"),
        ("ProGrad", ["TRAIN.STEP", "compiled"], "ProGrad takes gradients in a way of its own"),
    ],
)
def test_what_cannot_be_is_refused(room, name, opts, message):
    with pytest.raises(ConfigError, match=message):
        toy_trainer(room, name, *opts)


def test_a_decision_by_numbers_is_named(flat_world, captured, monkeypatch):
    loss = Learner.loss

    def decides(self, step):
        terms = loss(self, step)
        return terms if terms.total > 0 else None

    monkeypatch.setattr(Learner, "loss", decides)
    with pytest.raises(ConfigError, match="TRAIN.STEP: a step of Learner can't be compiled as a whole"):
        train(flat_world, "CoOp", "TRAIN.STEP", "compiled")


class Seen(TorchDispatchMode):
    """Keeps every operator with the shapes it met, and whether the operands of products of one row are contiguous."""

    def __init__(self):
        super().__init__()
        self.shapes, self.one_row = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.shapes.append((str(func), [tuple(tensor.shape) for tensor in tensors]))
        if func is torch.ops.aten.bmm.default and args[0].shape[1] == 1:
            self.one_row.append(args[0].is_contiguous())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SHALLOW)
def test_shapes_of_a_step_do_not_depend_on_its_batch(world, name):
    """What a CUDA graph needs. Class names are ragged, but fixed for a run, so that no bucket has to pad them."""
    trainer = world.trainer(name, 6, *SHALLOW[name], "MODEL.SPARSE_EXPERTS", False)
    batch = world.batch(trainer, 4)
    other = {"img": batch["img"].flip(0) * 0.5, "label": (batch["label"] + 1) % 6}
    found = []
    for given in (batch, batch, other):  # the first step makes what is made once
        with Seen() as seen:
            trainer.model.loss(trainer.model.step(given["img"], given["label"])).total.backward()
        found.append(seen.shapes)
    assert len(found[1]) > 100 and found[1] == found[2]
    assert len({len(tokens) for tokens in trainer.clip.tokenizer.class_tokens(trainer.model.task.classnames).ids}) > 1


def test_a_product_of_one_row_takes_no_slice(world):
    """Of a product of one row with a slice, PyTorch 2.14's compiler makes a wrong gradient, so the row is copied (last layer)."""
    trainer = world.trainer("CoOp", 6)
    batch = world.batch(trainer, 4)
    with Seen() as seen:
        trainer.model.loss(trainer.model.step(batch["img"], batch["label"]))
    assert seen.one_row and all(seen.one_row)
