"""Learning rates at every epoch against Dassl's, optimizers by config key, and the state of a schedule."""

import itertools

import pytest
import torch
from torch import nn

from promptmix.config import get_cfg_default
from promptmix.engine import build_lr_scheduler, build_optimizer
from promptmix.errors import CheckpointError, ConfigError

BASE = 0.002
EPOCHS = 10

# Recorded by running Dassl's schedulers (commit c61a1b5, its `verbose` argument taken out) on torch 2.14: base rate 0.002,
# GAMMA 0.1, MAX_EPOCH 10. Key: LR_SCHEDULER, STEPSIZE, WARMUP_EPOCH, WARMUP_RECOUNT. Value: the rates from epoch
# WARMUP_EPOCH to epoch 10, which are the same after both kinds of warm-up.
RATES = {
    ("single_step", 3, 0, True): [0.002, 0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05, 2e-05, 2e-06, 2e-06],
    ("single_step", 3, 1, True): [0.002, 0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05, 2e-05, 2e-06],
    ("single_step", 3, 1, False): [0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05, 2e-05, 2e-06, 2e-06],
    ("single_step", 3, 3, True): [0.002, 0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05],
    ("single_step", 3, 3, False): [0.002, 0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05],
    ("single_step", -1, 0, True): [0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.0002],
    ("single_step", -1, 1, True): [0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002],
    ("single_step", -1, 1, False): [0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.0002],
    ("single_step", -1, 3, True): [0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002],
    ("single_step", -1, 3, False): [0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.0002],
    ("multi_step", (3, 6, 8), 0, True): [0.002, 0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05, 2e-06, 2e-06, 2e-06],
    ("multi_step", (3, 6, 8), 1, True): [0.002, 0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05, 2e-06, 2e-06],
    ("multi_step", (3, 6, 8), 1, False): [0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05, 2e-06, 2e-06, 2e-06],
    ("multi_step", (3, 6, 8), 3, True): [0.002, 0.002, 0.002, 0.0002, 0.0002, 0.0002, 2e-05, 2e-05],
    ("multi_step", (3, 6, 8), 3, False): [0.002, 0.002, 0.002, 0.0002, 0.0002, 2e-05, 2e-05, 2e-05],
    ("cosine", -1, 0, True): [
        0.002,
        0.0019510565,
        0.001809017,
        0.0015877853,
        0.001309017,
        0.001,
        0.00069098301,
        0.00041221475,
        0.00019098301,
        4.8943484e-05,
        0.0,
    ],
    ("cosine", -1, 1, True): [
        0.002,
        0.0019510565,
        0.001809017,
        0.0015877853,
        0.001309017,
        0.001,
        0.00069098301,
        0.00041221475,
        0.00019098301,
        4.8943484e-05,
    ],
    ("cosine", -1, 1, False): [
        0.002,
        0.0018543973,
        0.0016276158,
        0.0013418545,
        0.0010250856,
        0.00070831675,
        0.00042255541,
        0.00019577393,
        5.0171262e-05,
        0.0,
    ],
    ("cosine", -1, 3, True): [0.002, 0.0019510565, 0.001809017, 0.0015877853, 0.001309017, 0.001, 0.00069098301, 0.00041221475],
    ("cosine", -1, 3, False): [0.002, 0.001648859, 0.0012596162, 0.00087037338, 0.00051923237, 0.00024056528, 6.1650004e-05, 0.0],
}

# Recorded likewise: the rates during the warm-up, with WARMUP_CONS_LR and WARMUP_MIN_LR 1e-5.
WARMUP = {
    ("linear", 0): [],
    ("constant", 1): [1e-05],
    ("constant", 3): [1e-05, 1e-05, 1e-05],
    ("linear", 1): [1e-05],
    ("linear", 3): [1e-05, 0.00066666667, 0.0013333333],
}


def optim_cfg(**keys):
    cfg = get_cfg_default().OPTIM
    cfg.NAME, cfg.LR, cfg.MAX_EPOCH = "sgd", BASE, EPOCHS
    for key, value in keys.items():
        cfg[key] = value
    return cfg


def two_groups(cfg):
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    return build_optimizer([], cfg, param_groups=[{"params": params[:1]}, {"params": params[1:], "lr": BASE / 10}])


def run(optimizer, schedule, epochs):
    """Return the rates of all groups at each epoch, stepping after it as trainers do."""
    seen = []
    for _ in range(epochs):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def case_cfg(case, kind):
    name, stepsize, warmup, recount = case
    return optim_cfg(
        LR_SCHEDULER=name,
        STEPSIZE=stepsize,
        WARMUP_EPOCH=warmup or -1,
        WARMUP_TYPE=kind,
        WARMUP_RECOUNT=recount,
    )


CASES = [(case, kind) for case, kind in itertools.product(RATES, ("linear", "constant")) if (kind, case[2]) in WARMUP]


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_rate_at_every_epoch_is_dassls(case, kind):
    cfg = case_cfg(case, kind)
    optimizer = two_groups(cfg)
    schedule = build_lr_scheduler(optimizer, cfg)
    seen = run(optimizer, schedule, EPOCHS + 1)
    head = WARMUP[kind, case[2]]
    want = head + RATES[case]
    assert [rates[0] for rates in seen] == pytest.approx(want, rel=1e-7, abs=1e-15)
    # A group with a tenth of the rate keeps its tenth, save that the fixed warm-up rates are everyone's.
    fixed = [rate == 1e-05 and epoch < len(head) for epoch, rate in enumerate(want)]
    tenth = [rate if flag else rate / 10 for rate, flag in zip(want, fixed, strict=True)]
    assert [rates[1] for rates in seen] == pytest.approx(tenth, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize(("case", "kind"), CASES)
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 9])
def test_rate_goes_on_after_a_resume(case, kind, stop, tmp_path):
    cfg = case_cfg(case, kind)
    optimizer = two_groups(cfg)
    whole = run(optimizer, build_lr_scheduler(optimizer, cfg), EPOCHS)

    first = two_groups(cfg)
    schedule = build_lr_scheduler(first, cfg)
    run(first, schedule, stop)
    torch.save([first.state_dict(), schedule.state_dict()], tmp_path / "state")
    states = torch.load(tmp_path / "state", weights_only=True)

    second = two_groups(cfg)
    resumed = build_lr_scheduler(second, cfg)
    second.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert run(second, resumed, EPOCHS - stop) == whole[stop:]


def test_state_is_plain_numbers():
    cfg = optim_cfg(LR_SCHEDULER="cosine", WARMUP_EPOCH=1, WARMUP_TYPE="constant")
    optimizer = two_groups(cfg)
    assert build_lr_scheduler(optimizer, cfg).state_dict() == {"last_epoch": 0, "last_lr": [1e-05, 1e-05]}


@pytest.mark.parametrize("state", [{}, {"last_epoch": 3, "last_lr": [0.1]}, {"last_epoch": "3", "last_lr": [0.1, 0.1]}])
def test_state_of_another_schedule_is_refused(state):
    cfg = optim_cfg(LR_SCHEDULER="cosine")
    schedule = build_lr_scheduler(two_groups(cfg), cfg)
    with pytest.raises(CheckpointError, match="doesn't fit this run"):
        schedule.load_state_dict(state)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"LR_SCHEDULER": "cosin"}, "OPTIM.LR_SCHEDULER is 'cosin'.*cosine"),
        ({"LR_SCHEDULER": "multi_step", "STEPSIZE": 3}, "OPTIM.STEPSIZE is 3.*list"),
        ({"LR_SCHEDULER": "single_step", "STEPSIZE": 2.5}, "OPTIM.STEPSIZE is 2.5.*whole number"),
        ({"WARMUP_EPOCH": 1, "WARMUP_TYPE": "steep"}, "OPTIM.WARMUP_TYPE is 'steep'.*linear, constant"),
    ],
)
def test_bad_schedules_name_key_and_choices(keys, message):
    cfg = optim_cfg(**keys)
    with pytest.raises(ConfigError, match=message):
        build_lr_scheduler(two_groups(cfg), cfg)


@pytest.mark.parametrize("name", ["single_step", "cosine"])
@pytest.mark.parametrize(("warm", "want"), [(-1, [BASE] * 3), (1, [1e-5, BASE, BASE])])
def test_a_schedule_over_no_epoch_stays_at_the_base_rate(name, warm, want):
    """Programs of others build one for a training that they leave out; Dassl's divides by the 0 only when it is stepped."""
    cfg = optim_cfg(LR=BASE, LR_SCHEDULER=name, MAX_EPOCH=0, WARMUP_EPOCH=warm)
    optimizer = two_groups(cfg)
    assert [rates[0] for rates in run(optimizer, build_lr_scheduler(optimizer, cfg), 3)] == pytest.approx(want)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", torch.optim.Adam),
        ("amsgrad", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("radam", torch.optim.RAdam),
        ("adamw", torch.optim.AdamW),
    ],
)
def test_every_optimizer_by_name(name, kind):
    optimizer = build_optimizer(nn.Linear(2, 2), optim_cfg(NAME=name, WEIGHT_DECAY=0.1, ADAM_BETA1=0.8))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (BASE, 0.1)
    assert group.get("amsgrad", False) is (name == "amsgrad")
    assert group.get("betas", (0.8, 0.999)) == (0.8, 0.999)


def test_sgd_and_rmsprop_keys():
    sgd = build_optimizer(nn.Linear(2, 2), optim_cfg(MOMENTUM=0.5, SGD_DAMPNING=0, SGD_NESTEROV=True)).param_groups[0]
    assert (sgd["momentum"], sgd["dampening"], sgd["nesterov"]) == (0.5, 0, True)
    rms = build_optimizer(nn.Linear(2, 2), optim_cfg(NAME="rmsprop", RMSPROP_ALPHA=0.7)).param_groups[0]
    assert (rms["momentum"], rms["alpha"]) == (0.9, 0.7)


def test_radam_steps_as_dassls():
    # Recorded from Dassl's own RAdam (its calls brought to today's signatures): steps 1, 5, 6, 7 and 12.
    want = {
        0: [1.002, -2.008, 0.5015],
        4: [1.004548, -2.022275, 0.507485],
        5: [1.003572, -2.020442, 0.507236],
        6: [1.0025, -2.01865, 0.507056],
        11: [0.995766, -2.010016, 0.506952],
    }
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = build_optimizer([weight], optim_cfg(NAME="radam", LR=0.01, WEIGHT_DECAY=0.1))
    for step in range(12):
        weight.grad = torch.tensor([0.1 * step - 0.3, 1.0 / (step + 1), -0.2])
        optimizer.step()
        if step in want:
            assert weight.tolist() == pytest.approx(want[step], abs=2e-6)


def test_staged_rates_split_old_and_new_layers():
    model = nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4)})
    optimizer = build_optimizer(model, optim_cfg(STAGED_LR=True, NEW_LAYERS=("head",), BASE_LR_MULT=0.1))
    old, new = optimizer.param_groups
    assert (old["lr"], new["lr"]) == (pytest.approx(BASE / 10), BASE)
    assert [p.numel() for p in old["params"]] == [6, 3]
    assert [p.numel() for p in new["params"]] == [12, 4]
    with pytest.raises(ConfigError, match="NEW_LAYERS names tail.*body, head"):
        build_optimizer(model, optim_cfg(STAGED_LR=True, NEW_LAYERS=("tail",)))
    with pytest.raises(TypeError, match="STAGED_LR"):
        build_optimizer(model.parameters(), optim_cfg(STAGED_LR=True))
    with pytest.warns(UserWarning, match="STAGED_LR is ignored"):
        build_optimizer(model, optim_cfg(STAGED_LR=True), param_groups=model.parameters())


def test_unknown_optimizer_lists_choices():
    with pytest.raises(ConfigError, match="OPTIM.NAME is 'sdg'.*adam, amsgrad, sgd"):
        build_optimizer(nn.Linear(2, 2), optim_cfg(NAME="sdg"))
