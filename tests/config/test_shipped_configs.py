"""The configs that ship: names that stand for files, what they share, and what the authors' scripts type."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from promptmix.cli import main
from promptmix.commands import train
from promptmix.config import get_cfg, get_key, merge_file, merge_opts, source_of, validate
from promptmix.config.flags import make_config, resolve_config
from promptmix.config.names import named_configs, named_tree
from promptmix.data.datasets.descriptions import DESCRIPTIONS
from promptmix.errors import ConfigError
from promptmix.parallel import launch
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import TRAINER_REGISTRY

get_plugin_manager()
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(named_configs(CONFIGS))
TINY = sorted(CONFIGS.glob("trainers/*/tiny.yaml"))
#: Sizes of the groups in the MoCoOp authors' configs (github.com/dyabel/mocoop, commit 04b5d2a, configs/datasets).
GROUPS = {
    **dict.fromkeys(("Caltech101", "DescribableTextures", "FGVCAircraft", "OxfordFlowers"), [1, 1, 1, 4, 2]),
    "EuroSAT": [1, 1, 2, 2, 4, 2],
    "Food101": [1, 3, 4, 2],
    "OxfordPets": [1, 2, 1, 1, 4, 2],
    "StanfordCars": [3, 1, 1, 4, 2],
    "SUN397": [1, 1, 4, 2],
    "UCF101": [1, 1, 1, 1, 4, 2],
    "ImageNet": [1, 1, 1, 1, 2, 2, 3, 1, 1, 1, 7, 2, 1, 2, 1, 1, 1, 1, 1, 1],
}


def merged(name):
    cfg = get_cfg()
    merge_file(cfg, resolve_config(f"configs/trainers/{name}.yaml"))
    return cfg


@pytest.mark.parametrize("name", NAMES)
def test_every_name_merges_and_validates(name):
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / name)
    merge_opts(cfg, ["DATASET.NAME", "EmojiFamilies"], source="the test")
    assert Path(name).parent.name == cfg.TRAINER.NAME
    validate(cfg)
    assert not (CONFIGS / name).exists()  # a file of that name would be taken in its place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CoOp/rn50", ("RN50", 200, "", 32)),
        ("CoOp/rn50_ep50", ("RN50", 50, "", 32)),
        ("CoOp/rn50_ep50_ctxv1", ("RN50", 50, "a photo of a", 32)),
        ("CoOp/rn50_val", ("RN50", 200, "", 200)),
        ("CoOp/rn101_ep50", ("RN101", 50, "", 32)),
        ("CoOp/vit_b32_ep50", ("ViT-B/32", 50, "", 32)),
        ("CoOp/vit_b16_ep100_ctxv1", ("ViT-B/16", 100, "a photo of a", 32)),
    ],
)
def test_coops_names_say_what_coops_files_say(name, expected):
    cfg = merged(name)
    assert expected == (
        cfg.MODEL.BACKBONE.NAME,
        cfg.OPTIM.MAX_EPOCH,
        cfg.TRAINER.COOP.CTX_INIT,
        cfg.DATALOADER.TRAIN_X.BATCH_SIZE,
    )


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("MaPLe/vit_b16_c2_ep5_batch4_2ctx", "MaPLe/base_to_new"),
        ("PromptSRC/vit_b16_c2_ep50_batch4_4+4ctx_few_shot", "PromptSRC/few_shot"),
        ("IVLP/vit_b16_c2_ep5_batch4_4ctx_language_only", "IVLP/language_only"),
        ("MPL/vit_b4_c1_add2_rm1_cross_datasets", "MPL/cross_dataset"),
        ("LwEIB/x2d", "LwEIB/cross_dataset"),
        ("TCP/vit_b16_ep100_ctxv1", "TCP/vit_b16_ep50_ctxv1"),
        ("MoPD/vit_b16_ep25_ctxv1", "MoPD/vit_b16"),
        ("HiCroPL/vit_b16_c2_ep50_batch32_16ctx", "HiCroPL/vit_b16_c2_ep50_batch32_16ctx_few_shot"),
    ],
)
def test_the_authors_names_stand_for_ours(name, same):
    assert merged(name) == merged(same)


@pytest.mark.parametrize(("theirs", "ours"), [("MultiModalAdapter", "MMA"), ("ALVLM", "PCB"), ("PLOTPP", "PLOTpp")])
def test_the_authors_trainers_are_known_by_our_names(theirs, ours):
    assert TRAINER_REGISTRY.get(theirs) is TRAINER_REGISTRY.get(ours)
    assert ours == make_config([], {"--trainer": ("TRAINER.NAME", theirs)}, []).TRAINER.NAME


def test_names_are_typed_from_any_folder_and_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = make_config(["trainers/CoOp/vit_b16_ep50.yaml"], {}, ["OPTIM.LR", "0.1"])
    assert (cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.LR) == (50, 0.1)
    assert str(source_of(cfg, "OPTIM.MAX_EPOCH")).endswith("CoOp/vit_b16_ep50.yaml")
    assert cfg.TRAINER.NAME == "CoOp" and str(source_of(cfg, "TRAINER.NAME")).endswith("CoOp/vit_b16.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'configs/trainers/CoOp/rn50_ep50.yaml'"):
        resolve_config("configs/trainers/CoOp/rn50_ep5.yaml")


def test_a_file_goes_before_a_name(tmp_path):
    (tmp_path / "_names.yaml").write_text("M/a: {OPTIM: {MAX_EPOCH: 3}}\nM/b: {_BASE_: a.yaml, OPTIM: {LR: 0.5}}\n")
    (tmp_path / "M").mkdir()
    cfg = get_cfg()
    merge_file(cfg, tmp_path / "M" / "b.yaml")
    assert (cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.LR) == (3, 0.5)
    (tmp_path / "M" / "a.yaml").write_text("OPTIM: {MAX_EPOCH: 7}\n")
    merge_file(cfg, tmp_path / "M" / "b.yaml")
    assert cfg.OPTIM.MAX_EPOCH == 7
    assert named_tree(tmp_path / "M" / "c.yaml") is None
    with pytest.raises(ConfigError, match=r"c.yaml: No such file"):
        merge_file(cfg, tmp_path / "M" / "c.yaml")


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.parent.name)
def test_tiny_configs_share_their_pictures(path):
    cfg = get_cfg()
    merge_file(cfg, path)
    for key in ("DATASET.NAME", "DATASET.NUM_SHOTS", "INPUT.TRANSFORMS", "TRAIN.PRINT_FREQ"):
        assert Path(str(source_of(cfg, key))).name == "_tiny.yaml"


@pytest.mark.parametrize("name", GROUPS)
def test_mocoops_groups_come_with_the_data_set(name):
    assert [len(group) for group in DESCRIPTIONS[name].groups] == GROUPS[name]


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("trainers/MoCoOp/*.yaml"))] + ["ucf101", "imagenet"])
def test_mocoop_supervises_chosen_experts_alone_where_batches_are_below_4(name):
    cfg = merged(f"MoCoOp/{name}")
    assert cfg.TEXT_SUPERVISION.GROUPEDCONTRASTIVE.CHOSEN_ONLY is (cfg.DATALOADER.TRAIN_X.BATCH_SIZE < 4)


def test_mocoop_has_a_name_for_each_of_the_eleven():
    files = {path.stem for path in CONFIGS.glob("datasets/*.yaml")} - {"emoji_concepts", "emoji_families"}
    tested_only = {"imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"}
    for name in files - tested_only:
        cfg = merged(f"MoCoOp/{name}")
        assert ((1, 10) if name == "imagenet" else (32, 50)) == (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.OPTIM.MAX_EPOCH)
        assert cfg.DATASET.TEMPLATE_GROUPS == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MMRL/vit_b16", ("B2N", 1.0, 512, 1.0, 4, 10, 0.001)),
        ("MMRL/eurosat", ("B2N", 0.01, 2048, 1.0, 4, 10, 0.001)),
        ("MMRL/imagenet", ("B2N", 0.5, 512, 1.0, 32, 5, 0.001)),
        ("MMRL/fs_imagenet", ("FS", 0.5, 512, 1.0, 32, 5, 0.001)),
        ("MMRL/fs_stanford_cars", ("FS", 7.0, 512, 1.0, 32, 50, 0.001)),
        ("MMRL/cross_dataset", ("CD", 0.2, 512, 1.0, 32, 1, 0.001)),
        ("MMRLpp/food101", ("B2N", 1.0, 512, 0.1, 4, 10, 0.001)),
        ("MMRLpp/fs_oxford_flowers", ("FS", 7.0, 512, 0.4, 32, 100, 0.002)),
        ("MMRLpp/fs_imagenet", ("FS", 0.2, 512, 0.9, 32, 5, 0.001)),
        ("MMRLpp/cd_imagenet_a", ("CD", 0.1, 512, 0.8, 32, 1, 0.001)),
        ("MMRLpp/cd_eurosat", ("CD", 0.1, 512, 0.3, 32, 1, 0.001)),
    ],
)
def test_mmrls_names_say_what_its_authors_files_and_table_say(name, expected):
    cfg = merged(name)
    node = cfg.TRAINER[cfg.TRAINER.NAME.upper()]
    optim = (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.LR)
    assert expected == (node.TASK, node.REG_WEIGHT, node.REP_DIM, node.get("BETA", 1.0), *optim)
    assert (cfg.OPTIM.NAME, cfg.INPUT.RRCROP_SCALE, node.ALPHA) == ("adamw", (0.5, 1.0), 0.7)


#: What the authors' scripts type (scripts/ of KaiyangZhou/CoOp, muzairkhattak/multimodal-prompt-learning 904dbd7 and PromptSRC
#: 8be7dcf): trainer, config, what stands at the end.
SCRIPTS = [
    (
        "CoOp",
        "CoOp/rn50",
        "TRAINER.COOP.N_CTX 16 TRAINER.COOP.CSC False TRAINER.COOP.CLASS_TOKEN_POSITION end DATASET.NUM_SHOTS 16",
    ),
    ("CoOp", "CoOp/rn50_val", "TRAINER.COOP.N_CTX 16 TRAINER.COOP.CSC False TRAINER.COOP.CLASS_TOKEN_POSITION end"),
    ("CoOp", "CoOp/vit_b16_ep50_ctxv1", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("ZeroshotCLIP", "CoOp/rn101", ""),
    ("ZeroshotCLIP", "CoOp/vit_b16", "DATASET.SUBSAMPLE_CLASSES new"),
    ("CoCoOp", "CoCoOp/vit_b16_c4_ep10_batch1_ctxv1", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("MaPLe", "MaPLe/vit_b16_c2_ep5_batch4_2ctx", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("MaPLe", "MaPLe/vit_b16_c2_ep5_batch4_2ctx_cross_datasets", "DATASET.NUM_SHOTS 16"),
    ("IVLP", "IVLP/vit_b16_c2_ep5_batch4_2+2ctx", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("IVLP", "IVLP/vit_b16_c2_ep5_batch4_4ctx_language_only", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("IVLP", "IVLP/vit_b16_c2_ep20_batch4_4+4ctx", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("VPT", "VPT/vit_b16_c2_ep5_batch4_4", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("PromptSRC", "PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
    ("PromptSRC", "PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx_cross_datasets", "DATASET.NUM_SHOTS 16"),
    ("PromptSRC", "PromptSRC/vit_b16_c2_ep50_batch4_4+4ctx_few_shot", "DATASET.NUM_SHOTS 4"),
    ("MPL", "MPL/vit_b4_c1_add2_rm1", "DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base"),
]


@pytest.mark.parametrize(("trainer", "config", "opts"), SCRIPTS, ids=lambda value: str(value)[:40])
def test_the_authors_command_lines_merge_and_validate(trainer, config, opts):
    files = ["configs/datasets/caltech101.yaml", f"configs/trainers/{config}.yaml"]
    flags = {"--root": ("DATASET.ROOT", "/path/to/datasets"), "--seed": ("SEED", 1), "--trainer": ("TRAINER.NAME", trainer)}
    cfg = make_config(files, flags, opts.split())
    validate(cfg)
    assert trainer == cfg.TRAINER.NAME and cfg.DATASET.NAME == "Caltech101" and cfg.INPUT.SIZE == (224, 224)


#: The same of scripts with names and keys of their own: command line, and keys here with what they become.
THEIRS = [
    (
        "MoPD MoPD/vit_b16_ep100_ctxv1 TRAINER.COOP.N_CTX 4 TRAINER.COOP.CSC False TRAINER.COOP.W 0.7 TRAINER.COOP.W2 0.5 "
        "LOSS.num_prompts 3 TRAINER.COOP.CLASS_TOKEN_POSITION end",
        {"TRAINER.MOPD.W": 0.7, "TRAINER.MOPD.W2": 0.5, "TRAINER.MOPD.K": 3},
    ),
    ("KgCoOp KgCoOp/vit_b16_ep100_ctxv1 TRAINER.COOP.N_CTX 4 TRAINER.COOP.W 4.0", {"TRAINER.KGCOOP.W": 4.0}),
    ("TCP TCP/vit_b16_ep100_ctxv1 TRAINER.COOP.N_CTX 4 TRAINER.COOP.CSC False TRAINER.COOP.W 1.0", {"TRAINER.TCP.W": 8.0}),
    ("MMRL MMRL/vit_b16_cross_datasets TRAINER.MMRL.REG_WEIGHT 0.2 TASK CD", {"TRAINER.MMRL.TASK": "CD"}),
    ("MultiModalAdapter MultiModalAdapter/vit_b16_ep5_imnet TRAINER.MMADAPTER.ADAPTER_DIM 16", {"TRAINER.MMA.ADAPTER_DIM": 16}),
    ("PromptKD PromptKD/vit_b16_c2_ep20_batch8_4+4ctx TRAINER.MODAL base2novel", {"TRAINER.NAME": "PromptKD"}),
    (
        "CoOp_ATP CoOp/vit_b16 TRAINER.COOP.N_CTX 2 TRAINER.ATPROMPT.USE_ATPROMPT True TRAINER.ATPROMPT.N_ATT1 3 "
        "TRAINER.ATPROMPT.N_ATT2 3",
        {"TRAINER.COOPATP.N_CTX": 2, "TRAINER.COOPATP.N_ATT": 3},
    ),
    ("MaPLe_ATP MaPLe/vit_b16_c2_ep5_batch4_2ctx TRAINER.MAPLE.N_CTX 4", {"TRAINER.MAPLEATP.N_CTX": 4, "OPTIM.LR": 0.0035}),
    ("CoPrompt coprompt", {"TRAINER.COPROMPT.PROMPT_DEPTH": 9}),
    (
        "ADAPTER SGD_lr1e-1_B256_ep300 TRAINER.ADAPTER.INIT RANDOM TRAINER.ADAPTER.CONSTRAINT none",
        {"TRAINER.CLAP.CONSTRAINT": "none"},
    ),
    ("TaskRes TaskRes/adam_lr2e-3_B256_ep100 TRAINER.TaskRes.RESIDUAL_SCALE 1.0", {"TRAINER.TASKRES.ALPHA": 1.0}),
    ("ProGrad ProGrad/rn50_ep100 TRAINER.COOP.CTX_INIT True", {"TRAINER.PROGRAD.CTX_INIT": "data set"}),
    ("KgCoOp KgCoOp/vit_b16_ep100_ctxv1 TRAINER.COOP.CTX_INIT True", {"TRAINER.KGCOOP.CTX_INIT": "a photo of a"}),
    ("ProGrad ProGrad/rn50 LOSS.LAMBDA 0.8 TRAINER.COOP.N_CTX 16", {"TRAINER.PROGRAD.LAMBDA": 0.8}),
    (
        "PLOTPP PLOTPP/vit TRAINER.PLOTPP.N_CTX 4 TRAINER.PLOTPP.CTX_INIT True TRAINER.PLOTPP.MODEL_UPD vision",
        {"TRAINER.PLOTPP.MODEL_UPD": "vision", "OPTIM.MAX_EPOCH": 50},
    ),
    ("CoCoOp CoCoOp/rn50_c4_ep10_batch1_ctxv1", {"MODEL.BACKBONE.NAME": "RN50"}),
]


@pytest.mark.parametrize(("line", "expected"), THEIRS, ids=lambda value: str(value)[:20])
def test_keys_of_the_authors_are_ours(line, expected):
    trainer, config, *opts = line.split()
    flags = {"--root": ("DATASET.ROOT", "/data"), "--trainer": ("TRAINER.NAME", trainer)}
    cfg = make_config(["configs/datasets/caltech101.yaml", f"configs/trainers/{config}.yaml"], flags, opts)
    validate(cfg)
    assert expected == {key: get_key(cfg, key) for key in expected}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ADAPTER TRAINER.ADAPTER.ENHANCED_BASE x.pt", "ENHANCED_BASE is 'x.pt', which CLAP does not have; give none"),
        ("ALVLM TRAINER.COOPAL.METHOD badge", "rounds are the protocol: promptmix run active"),
        (
            "CoOp_ATP TRAINER.ATPROMPT.N_ATT1 2 TRAINER.ATPROMPT.N_ATT2 4",
            "N_ATT1 and .*N_ATT2 are one key here, .*N_ATT; .*, or give N_ATTS",
        ),
        ("MoPD TRAINER.COOP.DEPTH 2", "unknown config key 'TRAINER.COOP.DEPTH'"),
        ("CoOp TRAINER.COOP.W 2", "unknown config key 'TRAINER.COOP.W'"),
    ],
)
def test_keys_of_the_authors_that_are_nothing_here(line, reason):
    trainer, *opts = line.split()
    with pytest.raises(ConfigError, match=reason):
        make_config([], {"--trainer": ("TRAINER.NAME", trainer)}, opts)


def test_a_source_with_both_nodes_keeps_them_apart():
    cfg = make_config([], {"--trainer": ("TRAINER.NAME", "KgCoOp")}, ["TRAINER.COOP.N_CTX", 3, "TRAINER.KGCOOP.N_CTX", 5])
    assert (cfg.TRAINER.COOP.N_CTX, cfg.TRAINER.KGCOOP.N_CTX) == (3, 5)


@pytest.mark.parametrize("trainer", [name for name in TRAINER_REGISTRY.registered_names() if name not in ("CoOp", "MoCoOp")])
def test_the_quick_start_leaves_other_methods_alone(trainer):
    """It has keys of CoOp's, which is what the authors of several methods call their own."""
    cfg = make_config(["configs/quickstart.yaml"], {"--trainer": ("TRAINER.NAME", trainer)}, [])
    assert cfg.TRAINER[trainer.upper()] == get_cfg().TRAINER[trainer.upper()]


@pytest.mark.parametrize("trainer", [["--trainer", "TaskRes"], ["--trainer=TaskRes"]], ids=len)
def test_flags_of_the_authors(capsys, trainer):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = [*trainer, "--enhanced-base", "none", "--device", "cuda:1", "OPTIM.LR", "0.1"]
    flags, opts = train.split_arguments(parser, words)
    assert opts == ["OPTIM.LR", "0.1", "--enhanced-base", "none"] and parser.parse_args(flags).device == "cuda:1"
    for given, meant in (("x.pth", "x.pth"), ("none", "")):
        cfg = make_config([], {"--trainer": ("TRAINER.NAME", "TaskRes")}, ["--enhanced-base", given])
        assert meant == cfg.TRAINER.TASKRES.ENHANCED_BASE
    assert main(["train", "--trainer", "CoOp", "--enhanced-base", "none"]) == 2
    assert "--enhanced-base" in capsys.readouterr().err


@pytest.mark.parametrize(("visible", "seen"), [("", "1"), ("4,6", "6")])
def test_one_of_several_gpus(monkeypatch, visible, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.take_gpu("cuda:1") == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == seen
    with pytest.raises(ConfigError, match="names 1 GPUs, counted from 0"):
        launch.take_gpu("cuda:1")


@pytest.mark.parametrize(
    "name", ["MaPLe/vit_b16_c2_ep5_batch4_4ctx", "VPT/vit_b16_c2_ep5_batch4_4ctx_language_only", "CoCoOp/rn50_ep50"]
)
def test_a_suggestion_never_crosses_methods(name):
    with pytest.raises(ConfigError) as error:
        resolve_config(f"configs/trainers/{name}.yaml")
    meant = str(error.value).partition("did you mean '")[2].partition("'")[0]
    assert not meant or Path(meant).parent.name == name.split("/")[0]
