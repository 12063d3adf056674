"""`import dassl` without Dassl: on request, never in front of a real one, and by name where something is missing."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import promptmix.dassl as pm
from promptmix.dassl.importing import MODULES
from promptmix.engine import TrainerX

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
        ("from dassl.data.datasets import PACS", r"promptmix.dassl lacks dassl.data.datasets.PACS"),
        ("import dassl.engine.da.mcd", r"promptmix.dassl lacks the module dassl.engine.da; install Dassl.pytorch"),
        ("from dassl.data.datasets import miniDomainNet", r"promptmix.dassl lacks dassl.data.datasets.miniDomainNet"),
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
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).classname)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "item")], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == "cat"


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


def test_clean_cfg_keeps_the_chosen_node(dassl):
    config = importlib.import_module("dassl.config")
    cfg = config.get_cfg_default()
    for name in ("ONE", "TWO"):
        cfg.TRAINER[name] = type(cfg)({"X": 1})
    config.clean_cfg(cfg, "one")
    assert "ONE" in cfg.TRAINER and "TWO" not in cfg.TRAINER and "NAME" in cfg.TRAINER
