"""Memory: class chunks and sparse experts change no number, estimates count, and a lack of memory says what helps."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from promptmix.clip.reference import encode_plain, plain_towers
from promptmix.cost.count import count
from promptmix.cost.estimate import estimate
from promptmix.cost.machine import measure_machine
from promptmix.errors import UserError, is_out_of_memory
from tests.clip.test_text import SHARED, TOKENIZER, WORDS
from tests.trainers.golden import golden_clip
from tests.trainers.toy import first_step, shallow, toy_trainer

SPARSE = ("ROUTER.NAME", "TopK", "ROUTER.TOPK.K", 1)


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("class_specific", [False, True])
def test_class_chunks_change_no_number(chunk, class_specific):
    text = SHARED[True]
    found = []
    for size in (0, chunk):
        generator = torch.Generator().manual_seed(0)
        middle = (len(WORDS),) if class_specific else ()
        context = torch.randn(2, *middle, 4, 32, generator=generator).requires_grad_()
        deep = {} if class_specific else {1: torch.randn(1, 2, 32, generator=generator).requires_grad_()}
        text.class_chunk = size
        try:
            features = text(text.compose(context, TOKENIZER.class_tokens(WORDS)), deep)
            found.append([features, *torch.autograd.grad(features.pow(3).sum(), [context, *deep.values()])])
            with torch.no_grad():
                torch.testing.assert_close(text(text.compose(context, TOKENIZER.class_tokens(WORDS)), deep), features)
        finally:
            text.class_chunk = 0
    for ours, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, ours, rtol=1e-5, atol=1e-4)


def test_class_chunks_bound_the_memory():
    text = golden_clip().text.to("meta")
    names = TOKENIZER.class_tokens([f"class {i}" for i in range(64)])
    found = {}
    for chunk in (0, 8):
        text.class_chunk = chunk
        context = torch.randn(1, 4, text.width, device="meta", requires_grad=True)
        found[chunk] = count(lambda context=context: text(text.compose(context, names)).sum().backward())
    assert found[8].live_mb < found[0].live_mb / 3
    assert found[8].gflops < found[0].gflops * 1.8


def test_plain_context_sends_prompts_at_full_length():
    text = SHARED[False]
    prompts = text.compose(torch.randn(1, 4, 32), TOKENIZER.class_tokens(WORDS))
    with plain_towers(text):
        assert torch.equal(text(prompts), encode_plain(text, prompts))
    assert text.shares_prefix


@pytest.mark.parametrize(
    "bank", [("PROMPT_BANK.NAME", "Soft", "PROMPT_BANK.SOFT.N_PROMPTS", 3), ("PROMPT_BANK.NAME", "TemplateGroups")]
)
def test_sparse_experts_change_no_number(room, bank):
    learned, flops = [], []
    for sparse in (False, True):
        trainer = toy_trainer(room, "Mixture", *SPARSE, *bank, "MODEL.SPARSE_EXPERTS", sparse)
        with torch.no_grad():
            trainer.model.router.gate.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))  # every image goes to the first expert
        for _ in range(2):  # momentum and weight decay too
            with FlopCounterMode(display=False) as counter:
                first_step(trainer)
        flops.append(counter.get_total_flops())
        learned.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert learned[0].keys() == learned[1].keys()
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, rtol=1e-5, atol=1e-6)
    assert flops[1] < flops[0]


def test_all_experts_are_encoded_where_a_loss_needs_them(room, monkeypatch):
    trainer = toy_trainer(room, "MoCoOp")
    bank = trainer.model.bank
    seen = []
    original = bank.forward
    monkeypatch.setattr(bank, "forward", lambda *args, **kwargs: seen.append(kwargs) or original(*args, **kwargs))
    first_step(trainer)
    assert all("experts" not in kwargs for kwargs in seen) and seen


@cache
def machine_of_tests(room):
    return measure_machine(shallow(toy_trainer(room, "CoOp")).clip)


#: Towers of two layers suffice where numbers of one way are compared with those of another.
SHALLOW = {"CoOp": (), "CoCoOp": (), "MoCoOp": (), "MaPLe": ("TRAINER.MAPLE.PROMPT_DEPTH", 2)}


@pytest.mark.parametrize("name", SHALLOW)
def test_estimate_counts_the_step_that_runs(room, name, monkeypatch):
    monkeypatch.setattr("promptmix.cost.estimate.measure_machine", lambda clip: machine_of_tests(room))
    trainer = shallow(toy_trainer(room, name, *SHALLOW[name]))
    batch = next(iter(trainer.train_loader_x))
    first_step(trainer)
    ran = count(lambda: trainer.model.loss(trainer.model.step(batch["img"], batch["label"])).total.backward())
    found = estimate(shallow(toy_trainer(room, name, *SHALLOW[name])))
    assert found.step_gflops == pytest.approx(ran.gflops, rel=0.02)  # attention kernels differ by device
    assert found.step_mb == pytest.approx(ran.live_mb, rel=0.25)
    assert found.epoch_seconds > 0 and found.step_mb > 0 and found.weights_mb > 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
    ],
)
def test_out_of_memory_names_two_settings_and_what_they_need(room, tmp_path, error, monkeypatch):
    trainer = shallow(toy_trainer(room, "CoOp", "OUTPUT_DIR", str(tmp_path)))
    monkeypatch.setattr(trainer, "forward_backward", lambda batch: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"out of memory: a step of CoOp .* MODEL.CLASS_CHUNK 1 \(\d+ MiB\)") as caught:
        trainer.train()
    assert "DATALOADER.TRAIN_X.BATCH_SIZE 2" in str(caught.value) and "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are(room, tmp_path, monkeypatch):
    trainer = toy_trainer(room, "CoOp", "OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(trainer, "forward_backward", lambda batch: (_ for _ in ()).throw(RuntimeError("mat1 and mat2")))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.train()
    assert not is_out_of_memory(ValueError("else"))


@pytest.mark.parametrize("name", ["CoOp", "MaPLe"])
def test_compiled_towers_give_the_same_numbers(room, monkeypatch, name):
    """The graphs are captured, differentiated and run, but not handed to a C++ compiler, which would take a minute.

    Sizes become symbols for CoOp alone: tracing with them takes four times as long.
    """
    compiled = []
    compile_ = partial(torch.compile, backend="aot_eager", dynamic=None if name == "CoOp" else False)
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or compile_(f))
    found = []
    for on in (False, True):
        trainer = shallow(toy_trainer(room, name, "MODEL.COMPILE", on, *SHALLOW[name]))
        assert not any("_orig_mod" in key for key in trainer.clip.state_dict())
        first_step(trainer)
        trainer.set_model_mode("eval")
        scores = trainer.model_inference(next(iter(trainer.test_loader))["img"]).detach()
        found.append([scores, *(p.detach().clone() for p in trainer.model.parameters())])
    assert sorted(compiled) == ["first_token_layer", "frozen_layer", "shared_block"]
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["CoOp", "MaPLe", "CoCoOp"])
def test_plain_towers_give_the_same_numbers(room, name):
    found = []
    for on in (False, True):
        trainer = toy_trainer(room, name, "MODEL.PLAIN_TOWERS", on)
        assert trainer.clip.text.shares_prefix is trainer.clip.image.skips_unread is not on
        first_step(trainer)
        found.append([p.detach().clone() for p in trainer.model.parameters()])
    for ours, full in zip(*found, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-5)
