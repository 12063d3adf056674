"""`import dassl` without Dassl: on request, never in front of a real one, and by name where something is missing."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import promptmix.dassl as pm
from promptmix.dassl.importing import MODULES
from promptmix.engine import TrainerX
from tests import forked

#: What the public checkouts of CoOp and its forks import, and the rest of what Dassl's packages offer that we have.
SURFACE = {
    "dassl.config": "get_cfg_default clean_cfg",
    "dassl.data": "DataManager DatasetWrapper",
    "dassl.data.data_manager": "DataManager DatasetWrapper build_data_loader",
    "dassl.data.datasets": "DATASET_REGISTRY Datum DatasetBase build_dataset",
    "dassl.data.datasets.base_dataset": "Datum DatasetBase",
    "dassl.data.samplers": "RandomDomainSampler SeqDomainSampler RandomClassSampler build_sampler",
    "dassl.data.transforms": "INTERPOLATION_MODES build_transform",
    "dassl.data.transforms.transforms": "INTERPOLATION_MODES build_transform",
    "dassl.engine": "TRAINER_REGISTRY build_trainer TrainerBase SimpleTrainer TrainerX TrainerXU SimpleNet",
    "dassl.engine.trainer": "TrainerBase SimpleTrainer TrainerX TrainerXU",
    "dassl.evaluation": "EVALUATOR_REGISTRY EvaluatorBase Classification build_evaluator",
    "dassl.metrics": "compute_accuracy compute_distance_matrix cosine_distance euclidean_squared_distance",
    "dassl.modeling": "HEAD_REGISTRY build_head NETWORK_REGISTRY build_network BACKBONE_REGISTRY Backbone build_backbone",
    "dassl.modeling.backbone": "BACKBONE_REGISTRY Backbone build_backbone resnet50",
    "dassl.optim": "build_optimizer build_lr_scheduler",
    "dassl.utils": (
        "AverageMeter Logger MetricMeter Registry check_availability check_isfile collect_env_info count_num_param download_url "
        "get_most_similar_str_to_a_from_b init_network_weights listdir_nohidden load_checkpoint load_pretrained_weights "
        "mkdir_if_missing open_all_layers open_specified_layers read_image read_json resume_from_checkpoint save_checkpoint "
        "set_random_seed setup_logger tolist_if_not write_json"
    ),
    "dassl.utils.tools": "mkdir_if_missing read_json",
}


@pytest.fixture
def dassl():
    assert pm.install()
    yield importlib.import_module("dassl")
    pm.uninstall()


def test_it_is_there_only_on_request():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dassl")
    assert pm.install() and pm.install()  # twice is fine
    assert importlib.import_module("dassl") is pm
    pm.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dassl.engine")


@pytest.mark.parametrize("module", list(SURFACE))
def test_surface(dassl, module):
    found = importlib.import_module(module)
    assert found is importlib.import_module(MODULES[module])  # no second copy of anything
    missing = [name for name in SURFACE[module].split() if not hasattr(found, name)]
    assert not missing


#: Every public name of KaiyangZhou/Dassl.pytorch at c61a1b5, by module.
REAL = json.loads((Path(__file__).resolve().parent / "dassl_names.json").read_text())
#: Dassl's own methods, data sets and image networks, which are no part of prompt learning.
ELSEWHERE = re.compile(
    r"dassl\.(engine\.(da|dg|ssl)|data\.datasets\.dg\.wilds)\b"
    r"|dassl\.modeling\.(backbone\.(alexnet|cnn_|efficientnet|preact|resnet_dynamic|vgg|wide)|network\.ddaig|ops\.(attention|conv|transnorm))"
)


@pytest.mark.parametrize("module", list(REAL))
def test_every_name_of_the_real_dassl_is_there_or_named_as_lacking(dassl, module):
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        assert ELSEWHERE.match(module) and "promptmix.dassl lacks the module" in str(error)
        return
    assert not ELSEWHERE.match(module)
    for name in REAL[module].split():
        try:
            getattr(found, name)
        except ImportError as error:
            assert re.search(r"promptmix.dassl lacks dassl\.\S+ \(", str(error))


def test_what_public_checkouts_import_from_it_is_there(dassl):
    """Of 61 names in 46 checkouts that the tests' authors read, those that the real Dassl has."""
    names = {
        "dassl.engine.trainer": "MetricMeter AverageMeter SummaryWriter TrainerX DataManager",
        "dassl.optim.radam": "RAdam AdamW PlainRAdam",
        "dassl.optim.lr_scheduler": "ConstantWarmupScheduler LinearWarmupScheduler AVAI_SCHEDS",
        "dassl.config": "cfg_default",
        "dassl.evaluation.build": "EVALUATOR_REGISTRY Registry check_availability",
        "dassl.modeling.ops": "MixStyle mixup ReverseGrad SinkhornDivergence create_onehot",
        "dassl.modeling.ops.utils": "sigmoid_rampup ema_model_update sharpen_prob",
    }
    for module, wanted in names.items():
        assert all(hasattr(importlib.import_module(module), name) for name in wanted.split())


def test_star_imports_give_the_public_names(dassl):
    names: dict[str, object] = {}
    exec("from dassl.utils import *", names)  # as Dassl's own packages do
    assert set(SURFACE["dassl.utils"].split()) <= set(names)


def test_classes_are_the_engines(dassl):
    assert importlib.import_module("dassl.engine").TrainerX is TrainerX


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from dassl.engine import MCD", r"promptmix.dassl lacks dassl.engine.MCD \(a method for domain adaptation"),
        ("from dassl.data.datasets import FMoW", r"promptmix.dassl lacks dassl.data.datasets.FMoW \(a data set of WILDS"),
        ("import dassl.engine.da.mcd", r"promptmix.dassl lacks the module dassl.engine.da; install Dassl.pytorch"),
        ("from dassl.modeling.ops import Attention", r"promptmix.dassl lacks dassl.modeling.ops.Attention"),
        ("from dassl.utils import nonsense", r"cannot import name 'nonsense'"),
    ],
)
def test_what_it_lacks_is_named(dassl, statement, message):
    with pytest.raises(ImportError, match=message):
        exec(statement)


def test_a_real_dassl_stays_in_front(tmp_path, monkeypatch):
    (tmp_path / "dassl").mkdir()
    (tmp_path / "dassl" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not pm.install()
    real = importlib.import_module("dassl")
    assert real.real and not pm.install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dassl.engine")  # ours does not fill its gaps
    with pm.installed():  # a --coop-repo run asks for our engine
        assert importlib.import_module("dassl") is pm
    assert sys.modules["dassl"] is real
    del sys.modules["dassl"]


def test_installed_before_a_real_one_came(tmp_path, monkeypatch, dassl):
    pm.uninstall()
    pm.install()
    (tmp_path / "dassl.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.import_module("dassl").real
    del sys.modules["dassl"]


def test_items_pickle_both_ways(dassl):
    datasets = importlib.import_module("dassl.data.datasets")
    item = datasets.Datum(impath="a.png", label=2, domain=1, classname="cat")
    again = pickle.loads(pickle.dumps(item))
    assert (again.impath, again.label, again.domain, again.classname) == ("a.png", 2, 1, "cat")


def test_items_reach_worker_processes_without_the_hook(dassl, tmp_path):
    """Workers that are started anew can't import `dassl`."""
    from multiprocessing.reduction import ForkingPickler

    item = importlib.import_module("dassl.data.datasets").Datum("a.png", 2, 1, "cat")
    (tmp_path / "item").write_bytes(bytes(ForkingPickler.dumps(item)))

    def load(words):
        for name in [name for name in sys.modules if name.partition(".")[0] == "dassl"]:
            del sys.modules[name]
        sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]
        assert find_spec("dassl") is None
        print(pickle.loads(Path(words[0]).read_bytes()).classname)
        return 0

    done = forked.run([str(tmp_path / "item")], Path(__file__).resolve().parents[2], work=load)
    assert (done.returncode, done.stdout.strip()) == (0, "cat"), done.stderr


def test_distances():
    metrics = importlib.import_module("promptmix.dassl.metrics")
    a, b = torch.randn(3, 4), torch.randn(2, 4)
    assert torch.allclose(metrics.compute_distance_matrix(a, b), torch.cdist(a, b) ** 2, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    assert torch.allclose(metrics.compute_distance_matrix(a, b, "cosine"), 1 - cosine, atol=1e-6)
    with pytest.raises(ValueError, match="metric is 'l1'"):
        metrics.compute_distance_matrix(a, b, "l1")
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4,\)"):
        metrics.compute_distance_matrix(a, b[0])


def test_layers_open_and_start_anew():
    utils = importlib.import_module("promptmix.dassl.utils")
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    utils.open_specified_layers(net, "1")
    assert [child.training for child in net] == [False, True]
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
    utils.open_all_layers(net)
    assert all(p.requires_grad for p in net.parameters()) and net[0].training
    utils.init_network_weights(net, "kaiming")
    assert not net[0].bias.any()
    for call in (lambda: utils.open_specified_layers(net, ["7"]), lambda: utils.init_network_weights(net, "ones")):
        with pytest.raises(ValueError, match=r"no layer '7'|init_type is 'ones'"):
            call()
    with pytest.raises(ValueError, match=r"got \[CoOpp\], did you mean \[CoOp\]\?"):
        utils.check_availability("CoOpp", ["CoOp", "MaPLe"])


def test_simple_net(dassl):
    modeling = importlib.import_module("dassl.modeling")
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.PRETRAINED = "resnet18", False
    cfg.MODEL.HEAD.NAME, cfg.MODEL.HEAD.HIDDEN_LAYERS = "mlp", (16, 8)
    net = modeling.SimpleNet(cfg, cfg.MODEL, 3).eval()
    scores, features = net(torch.randn(2, 3, 32, 32), return_feature=True)
    assert scores.shape == (2, 3) and features.shape == (2, 8) and net.fdim == 8
    with pytest.raises(ValueError, match="an mlp needs hidden layers"):
        modeling.mlp(4, ())


def test_warm_ups_step_as_dassls_do():
    optim = importlib.import_module("promptmix.dassl.optim")
    layer = torch.nn.Linear(1, 1)
    rates = {}
    for kind, start in ((optim.ConstantWarmupScheduler, 0.01), (optim.LinearWarmupScheduler, 0.02)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        schedule = kind(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), 3, start)
        rates[kind] = []
        for _ in range(6):
            rates[kind].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[optim.ConstantWarmupScheduler] == pytest.approx([0.01, 0.01, 0.01, 1.0, 0.5, 0.25])
    assert rates[optim.LinearWarmupScheduler] == pytest.approx([0.02, 1 / 3, 2 / 3, 1.0, 0.5, 0.25])


def test_layers_of_domain_generalisation():
    ops = importlib.import_module("promptmix.dassl.ops")
    torch.manual_seed(0)
    x = torch.randn(6, 2, 4, 4, requires_grad=True)
    for kind in (ops.MixStyle, ops.EFDMix):
        mix = kind(p=1.0, alpha=0.3)
        mixed = mix(x)
        assert not torch.allclose(mixed, x) and mixed.shape == x.shape
        assert torch.equal(mix.eval()(x), x)
        mix.train()
        model = torch.nn.Sequential(mix)
        off, on = (
            (ops.run_without_mixstyle, ops.run_with_mixstyle)
            if kind is ops.MixStyle
            else (ops.run_without_efdmix, ops.run_with_efdmix)
        )
        with off(model):
            assert torch.equal(model(x), x)
        with on(model, mix="crossdomain"):
            assert mix.mix == "crossdomain" and not torch.allclose(model(x), x)
        assert torch.equal(model(x), x)  # off again
        (gradient,) = torch.autograd.grad(mixed.sum(), x)
        assert gradient.isfinite().all()
    # Mixing with a weight of 1 for oneself changes nothing; with 0, the values are the partner's.
    alone = torch.arange(6)
    assert torch.allclose(ops.EFDMix()._mixed(x, torch.zeros(6, 1, 1, 1), alone), x, atol=1e-6)
    other = ops.EFDMix()._mixed(x, torch.zeros(6, 1, 1, 1), alone.flip(0))
    assert torch.allclose(other.flatten(2).sort(-1).values, x.flip(0).flatten(2).sort(-1).values, atol=1e-6)
    reversed_gradient = torch.autograd.grad(ops.ReverseGrad()(x, 2.0).sum(), x)[0]
    assert torch.equal(reversed_gradient, torch.full_like(x, -2.0))


def test_distances_between_batches():
    ops = importlib.import_module("promptmix.dassl.ops")
    torch.manual_seed(0)
    x, near, far = torch.randn(16, 3), torch.randn(16, 3), torch.randn(16, 3) + 3
    for distance in (
        ops.MaximumMeanDiscrepancy(),
        ops.MaximumMeanDiscrepancy("poly"),
        ops.SinkhornDivergence("euclidean", eps=1.0, max_iter=50),
        ops.MinibatchEnergyDistance("euclidean", eps=1.0, max_iter=50),
    ):
        assert distance(x, far) > distance(x, near)
    assert ops.SinkhornDivergence("euclidean", max_iter=50)(x, x).abs() < 1e-5
    _, plan = ops.SinkhornDivergence(eps=0.5, max_iter=200).transport_cost(x, near, return_pi=True)
    assert torch.allclose(plan.sum(1), torch.full((16,), 1 / 16), atol=1e-3)
    first, second = ops.mixup(torch.ones(4, 1, 2, 2), torch.zeros(4, 1, 2, 2), torch.eye(4), torch.zeros(4, 4), 0.5, True)
    assert torch.allclose(first[:, 0, 0, 0], second.diagonal()) and (first >= 0.5).all()
    assert ops.sigmoid_rampup(0, 10) == pytest.approx(0.0067, abs=1e-4) and ops.linear_rampup(5, 10) == 0.5


def test_clean_cfg_keeps_the_chosen_node(dassl):
    config = importlib.import_module("dassl.config")
    cfg = config.get_cfg_default()
    for name in ("ONE", "TWO"):
        cfg.TRAINER[name] = type(cfg)({"X": 1})
    config.clean_cfg(cfg, "one")
    assert "ONE" in cfg.TRAINER and "TWO" not in cfg.TRAINER and "NAME" in cfg.TRAINER


def test_policies_of_autoaugment(dassl):
    transforms = importlib.import_module("dassl.data.transforms")
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for policy in (transforms.ImageNetPolicy(), transforms.CIFAR10Policy(), transforms.SVHNPolicy(fillcolor=(0, 0, 0))):
        assert policy(picture).shape == picture.shape
    assert transforms.SVHNPolicy().fill == [128, 128, 128]
