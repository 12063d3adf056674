"""Checkpoints in the authors' layout: read safely, renamed by one table, with the golden logits after loading."""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache

import pytest
import torch

from promptmix.cli import main
from promptmix.engine import EpochSchedule, convert, load_checkpoint, load_state_dict_strict, resume_from_checkpoint
from promptmix.engine.layout import rename
from promptmix.engine.unpickle import Placeholder
from promptmix.errors import CheckpointError
from tests.trainers import test_coop_family_golden, test_coop_mocoop_golden, test_deep_golden
from tests.trainers.golden import FOLDER, close, golden_clip, images, numbers, seeded

#: Golden case -> trainer.
CASES = {
    "coop_end": "CoOp",
    "coop_end_csc": "CoOp",
    "cocoop": "CoCoOp",
    "kgcoop": "KgCoOp",
    "mopd": "MoPD",
    "maple": "MaPLe",
    "ivlp": "IVLP",
    "promptsrc": "PromptSRC",
    "mpl": "MPL",
    "mocoop": "MoCoOp",
}


@lru_cache(maxsize=1)
def clip():
    return golden_clip()


def build(case):
    """The learner of a golden case."""
    if case.startswith("coop"):
        return test_coop_mocoop_golden.coop(case, clip())
    if case == "mocoop":
        return test_coop_mocoop_golden.mocoop(5, clip())
    if case in ("cocoop", "kgcoop", "mopd"):
        return getattr(test_coop_family_golden, case)(clip())
    return test_deep_golden.build(case)


def theirs(case):
    """What the authors' code saves for a case: golden tensors, class-name buffers, and the frozen model where they save it."""
    shapes = json.loads((FOLDER / f"{case}.json").read_text())["learned"]
    layout = convert.layouts()[CASES[case]]
    state = {name: torch.from_numpy(seeded().learned(case, name, tuple(shape))) for name, shape in shapes.items()}
    state |= {"prompt_learner.token_prefix": torch.zeros(5, 1, 512), "prompt_learner.token_suffix": torch.zeros(5, 72, 512)}
    if case == "mocoop":
        state |= {f"prompt_learner.token_prefix_all_{i}": torch.zeros(5, 1, 512) for i in range(3)}
        state["prompt_learner.grouped_prototypes"] = torch.zeros(3, 5, 512)
    if case == "kgcoop":
        state["prompt_learner.bias_vectors"] = torch.zeros(1, 512)
    if not layout.whole:
        return {name.removeprefix("prompt_learner."): tensor for name, tensor in state.items()}
    frozen = {f"image_encoder.{name}": tensor for name, tensor in clip().image.visual.state_dict().items()}
    if case == "promptsrc":
        frozen |= {f"prompt_learner.ZS_{name}": tensor for name, tensor in frozen.items()}
    return {**state, **frozen, "text_encoder.ln_final.weight": torch.ones(512), "logit_scale": torch.tensor(2.6)}


def learned_part(case):
    """The authors' tensors that training changes."""
    names = json.loads((FOLDER / f"{case}.json").read_text())["learned"]
    whole = convert.layouts()[CASES[case]].whole
    state = theirs(case)
    return {name if whole else name.removeprefix("prompt_learner."): state[name if whole else name[15:]] for name in names}


def save(folder, case, state=None, epoch=5, best=True):
    """Write a checkpoint as Dassl does: with the whole scheduler, whose successor drags its optimizer along."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0)
    scheduler = {"successor": successor, "warmup_epoch": 1, "cons_lr": 1e-5, "last_epoch": 1, "_last_lr": [0.05]}
    path = folder / convert.layouts()[CASES[case]].folder
    path.mkdir(parents=True)
    checkpoint = {
        "state_dict": theirs(case) if state is None else state,
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler,
        "val_result": None,
    }
    torch.save(checkpoint, path / f"model.pth.tar-{epoch}")
    (path / "checkpoint").write_text(f"model.pth.tar-{epoch}\n")
    if best:
        os.link(path / f"model.pth.tar-{epoch}", path / "model-best.pth.tar")
    return folder


def logits(learner):
    with torch.no_grad():
        return learner.logits(learner.encode_images(images()), learner.classifier())


@pytest.mark.parametrize("case", list(CASES))
def test_round_trip_and_golden_logits(case, tmp_path):
    trainer = CASES[case]
    found = convert.find_theirs(save(tmp_path / "theirs", case), trainer)
    learner = build(case)
    convert.check_backbone(found, clip().image.visual)
    load_state_dict_strict(learner, found.models[convert.LEARNER], "theirs")
    close(logits(learner), numbers(case)["logits"])

    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--trainer", trainer]) == 0
    again = convert.read(tmp_path / "ours")
    assert (again.trainer, again.epoch) == (trainer, 5)
    load_state_dict_strict(learner, again.models[convert.LEARNER], "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "coop"]) == 0
    back = load_checkpoint(tmp_path / "back" / convert.layouts()[trainer].folder / "model.pth.tar-5")["state_dict"]
    before = learned_part(case)
    assert {name for name in back if "ln_" not in name} == set(before)
    for name, tensor in before.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype


def test_every_layout_is_of_a_trainer_and_goes_both_ways():
    from promptmix.plugin_manager import get_plugin_manager
    from promptmix.registry import TRAINER_REGISTRY

    get_plugin_manager()
    assert set(CASES.values()) | {"ProGrad", "VPT"} <= set(convert.layouts())
    for trainer, layout in convert.layouts().items():
        assert trainer in TRAINER_REGISTRY
        for rule in layout.rules:
            name = re.sub(r"\{i\}", "3", re.sub(r"\{j\}", "2", rule.theirs))
            ours, _ = rename(layout.rules, name)
            back, _ = rename(layout.rules, ours, backwards=True)
            # Authors keep some tensors under two names (MaPLe's VPT, HiCroPL's ctx): the first is the one that is written.
            assert back == name or rename(layout.rules, back)[0] == ours


def test_numbers_that_are_none_are_not_handed_on(tmp_path):
    broken = {name: tensor * float("nan") for name, tensor in theirs("kgcoop").items()}
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert.find_theirs(save(tmp_path, "kgcoop", broken), "KgCoOp")


def test_types_that_nothing_is_learned_in_are_not_handed_on(tmp_path):
    whole = {name: tensor.long() for name, tensor in theirs("kgcoop").items()}
    with pytest.raises(CheckpointError, match="is of type torch.int64, and what is learned"):
        convert.find_theirs(save(tmp_path, "kgcoop", whole), "KgCoOp")


def test_a_left_over_name_is_an_error(tmp_path):
    folder = save(tmp_path, "kgcoop", {**theirs("kgcoop"), "adapter.fc.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"adapter.fc.weight does not belong to KgCoOp as its authors saved it"):
        convert.find_theirs(folder, "KgCoOp")
    with pytest.raises(CheckpointError, match="which method wrote it"):
        convert.read(folder)


def test_a_missing_tensor_is_an_error(tmp_path):
    state = theirs("cocoop")
    del state["meta_net.linear2.bias"]
    found = convert.find_theirs(save(tmp_path, "cocoop", state), "CoCoOp")
    with pytest.raises(CheckpointError, match=r"lacks bank.meta_net.linear2.bias"):
        load_state_dict_strict(build("cocoop"), found.models[convert.LEARNER], found.source)


def test_another_backbone_is_an_error(tmp_path):
    state = theirs("ivlp")
    state["image_encoder.transformer.resblocks.1.ln_1.weight"] = torch.zeros(768)
    found = convert.find_theirs(save(tmp_path, "ivlp", state), "IVLP")
    with pytest.raises(CheckpointError, match=r"transformer.resblocks.1.ln_1.weight differs"):
        convert.check_backbone(found, clip().image.visual)


def test_fp16_rounding_is_no_other_backbone(tmp_path):
    state = {name: tensor.half() for name, tensor in theirs("maple").items()}
    convert.check_backbone(convert.find_theirs(save(tmp_path, "maple", state), "MaPLe"), clip().image.visual)


def test_the_method_is_told_by_names_or_log(tmp_path):
    assert convert.read(save(tmp_path / "maple", "maple")).trainer == "MaPLe"
    assert convert.read(save(tmp_path / "mopd", "mopd", best=False)).trainer == "MoPD"
    coop = save(tmp_path / "coop", "coop_end")
    with pytest.raises(CheckpointError, match=r"it could be of CoOp, KgCoOp, PCB, PLOT, ProDA, ProGrad; say it with --trainer"):
        convert.read(coop)
    assert convert.read(coop, trainer="ProGrad").trainer == "ProGrad"


def test_convert_refuses_what_it_would_overwrite(tmp_path, capsys):
    assert main(["convert", str(save(tmp_path, "maple")), str(tmp_path)]) == 2
    assert main(["convert", str(save(tmp_path / "m", "maple")), str(tmp_path / "out"), "--trainer", "CoOp"]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_an_export_of_another_epoch_is_refused(tmp_path):
    convert.write_ours(convert.read(save(tmp_path / "in", "maple")), tmp_path / "out")
    assert convert.read(tmp_path / "out", 5).epoch == 5
    with pytest.raises(CheckpointError, match=r"is of epoch 5, not 7"):
        convert.read(tmp_path / "out", 7)


# Reading without running


def test_schedulers_become_placeholders(tmp_path):
    checkpoint = load_checkpoint(save(tmp_path, "coop_end") / "prompt_learner" / "model.pth.tar-5")
    successor = checkpoint["scheduler"]["successor"]
    assert isinstance(successor, Placeholder)
    assert successor.wanted == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert successor.state["T_max"] == 5.0
    assert isinstance(successor.state["optimizer"], Placeholder)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_of_a_file_is_run(tmp_path, zipped):
    checkpoint = {"state_dict": {}, "epoch": 1, "scheduler": {"x": Evil(tmp_path / "made")}}
    torch.save(checkpoint, tmp_path / "evil.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"GLOBAL (posix|nt).mkdir.*never runs code"):
        load_checkpoint(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "made").exists()


def test_a_class_of_nobody_stands_for_a_scheduler_without_import(tmp_path, monkeypatch):
    """Files name Dassl's and forks' classes, which are not there."""
    import sys
    import types

    module = types.ModuleType("nobodys.optim.lr_scheduler")
    kind = type("WarmupScheduler", (), {"__module__": module.__name__})
    module.WarmupScheduler = kind
    for name in ("nobodys", "nobodys.optim", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"state_dict": {}, "epoch": 1, "scheduler": kind()}, tmp_path / "file")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "file")["scheduler"].wanted == "nobodys.optim.lr_scheduler.WarmupScheduler"


def test_resume_of_dassls_scheduler_goes_on_at_the_epoch(tmp_path):
    """Dassl's warm-up keeps its own count; ours follows from the epoch."""
    layer = torch.nn.Linear(1, 2, bias=False)
    save(tmp_path, "coop_end", {"weight": torch.ones(2, 1)})
    optimizer = torch.optim.SGD([layer.weight], lr=0.1, momentum=0.9)
    schedule = EpochSchedule(optimizer, lambda epoch: 1 / (1 + epoch))
    assert resume_from_checkpoint(tmp_path / "prompt_learner", layer, None, schedule) == 5
    assert schedule.last_epoch == 5 and optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 6)
