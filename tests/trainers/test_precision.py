"""Logits in bf16 stay near those in fp32: within 0.05 in cosine, whatever the temperature."""

from __future__ import annotations

import pytest

from tests.trainers.toy import first_step, scores, toy_trainer

#: What bf16's 8 bits of mantissa cost after twelve layers of each tower, in units of the cosine.
TOLERANCE = 0.05


@pytest.mark.parametrize("name", ["CoOp", "CoCoOp", "MoCoOp", "MaPLe", "ZeroshotCLIP"])
def test_bf16_logits_stay_near_fp32(room, name):
    found = {}
    for precision in ("fp32", "bf16"):
        trainer = toy_trainer(room, name, "TRAINER.PREC", precision)
        found[precision] = scores(trainer) / trainer.clip.scale
    assert found["bf16"].dtype == found["fp32"].dtype
    assert (found["bf16"] - found["fp32"]).abs().max() < TOLERANCE
    assert not found["bf16"].equal(found["fp32"])


@pytest.mark.parametrize("name", ["CoOp", "MoCoOp"])
def test_bf16_losses_stay_near_fp32(room, name):
    losses = [float(first_step(toy_trainer(room, name, "TRAINER.PREC", precision))["loss"]) for precision in ("fp32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
