"""The config tree: Dassl's keys and defaults, ours beside them, and merging that refuses what it doesn't understand."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from promptmix.config.declare import parse_sum
from promptmix.errors import ConfigError
from promptmix.registry import Registry, closest

__all__ = [
    "CN",
    "get_cfg",
    "get_cfg_default",
    "get_key",
    "merge_file",
    "merge_opts",
    "merge_tree",
    "reset",
    "source_of",
    "sources",
    "validate",
]

#: Values that a key may take, for keys whose choices no registry knows.
CHOICES: dict[str, tuple[Any, ...]] = {
    "DATASET.SUBSAMPLE_CLASSES": ("all", "base", "new"),
    "DATASET.CLASS_ORDER": ("sorted", "seeded"),
    "DEVICE": ("auto", "cpu", "cuda"),
    "INPUT.INTERPOLATION": ("bilinear", "bicubic", "nearest"),
    "INPUT.READING": ("auto", "upright", "benchmark"),
    "OPTIM.LR_SCHEDULER": ("single_step", "multi_step", "cosine"),
    "OPTIM.WARMUP_TYPE": ("linear", "constant"),
    "TEST.FINAL_MODEL": ("last_step", "best_val"),
    "TEST.SPLIT": ("test", "val"),
    "TRAIN.COUNT_ITER": ("train_x", "train_u", "smaller_one"),
    "TRAINER.PREC": ("fp32", "amp", "bf16"),
}


def get_cfg_default() -> CN:
    """Return a new config tree with Dassl's keys and defaults and promptmix's own, without any method's node."""
    # Defaults are those of Dassl.pytorch (commit c61a1b5); keys marked "ours" are not Dassl's.
    cfg = CN()
    cfg.VERSION = 1
    cfg.OUTPUT_DIR = "./output"  # folder for log.txt, results.json and checkpoints
    cfg.RESUME = ""  # folder of an earlier run to continue from; "" looks in OUTPUT_DIR
    cfg.SEED = -1  # negative: not seeded
    cfg.USE_CUDA = True  # False keeps everything on the CPU (Dassl's key; DEVICE is finer)
    cfg.DEVICE = "auto"  # ours: auto | cpu | cuda
    cfg.VERBOSE = True  # print the data set table and parameter counts

    cfg.INPUT = CN()
    cfg.INPUT.SIZE = (224, 224)  # pixels, height and width
    cfg.INPUT.INTERPOLATION = "bilinear"  # bilinear | bicubic | nearest
    # ours: auto | upright (EXIF turns, transparent on white) | benchmark (as CoOp reads); auto: upright for ImageFolder and CSV
    cfg.INPUT.READING = "auto"
    cfg.INPUT.TRANSFORMS = ()  # names, see promptmix.data.reading.transforms
    cfg.INPUT.NO_TRANSFORM = False  # True: batches carry untransformed pictures
    cfg.INPUT.PIXEL_MEAN = [0.485, 0.456, 0.406]
    cfg.INPUT.PIXEL_STD = [0.229, 0.224, 0.225]
    cfg.INPUT.CROP_PADDING = 4  # pixels
    cfg.INPUT.RRCROP_SCALE = (0.08, 1.0)  # share of the area that random_resized_crop keeps
    cfg.INPUT.CUTOUT_N = 1
    cfg.INPUT.CUTOUT_LEN = 16  # pixels
    cfg.INPUT.GN_MEAN = 0.0
    cfg.INPUT.GN_STD = 0.15
    cfg.INPUT.RANDAUGMENT_N = 2
    cfg.INPUT.RANDAUGMENT_M = 10
    cfg.INPUT.COLORJITTER_B = 0.4
    cfg.INPUT.COLORJITTER_C = 0.4
    cfg.INPUT.COLORJITTER_S = 0.4
    cfg.INPUT.COLORJITTER_H = 0.1
    cfg.INPUT.RGS_P = 0.2  # probability of random grey scale
    cfg.INPUT.GB_P = 0.5  # probability of Gaussian blur
    cfg.INPUT.GB_K = 21  # blur kernel in pixels, odd
    cfg.INPUT.CACHED_VIEWS = 0  # ours: train on K precomputed views a picture when the image tower is frozen; 0 = off
    cfg.INPUT.FEATURE_CACHE = True  # ours: keep features of evaluation pictures and cached views on disk, if the tower is frozen
    cfg.INPUT.FEATURE_CACHE_DIR = ""  # ours: folder; "" = PROMPTMIX_CACHE_DIR, else the user's cache folder
    cfg.INPUT.FEATURE_CACHE_GB = 5.0  # ours: what was not used for longest goes first; 0 = no limit

    cfg.DATASET = CN()
    cfg.DATASET.ROOT = ""  # folder of the data sets
    cfg.DATASET.NAME = ""  # a name of the dataset registry
    cfg.DATASET.SOURCE_DOMAINS = ()
    cfg.DATASET.TARGET_DOMAINS = ()
    cfg.DATASET.NUM_LABELED = -1  # semi-supervised sets: labelled items in total
    cfg.DATASET.NUM_SHOTS = -1  # training pictures per class; below 1 = all
    cfg.DATASET.VAL_PERCENT = 0.1
    cfg.DATASET.STL10_FOLD = -1
    cfg.DATASET.CIFAR_C_TYPE = ""
    cfg.DATASET.CIFAR_C_LEVEL = 1
    cfg.DATASET.ALL_AS_UNLABELED = False
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"  # CoOp's key: all | base | new
    cfg.DATASET.TEMPLATE_GROUPS = ()  # ours: groups of templates in place of the data set's own; () = its own
    cfg.DATASET.CLASS_ORDER = "sorted"  # ours: sorted | seeded (class order drawn from SEED, so base/new differ by seed)

    cfg.DATALOADER = CN()
    cfg.DATALOADER.NUM_WORKERS = 4
    cfg.DATALOADER.PERSISTENT_WORKERS = True  # ours: training workers stay from epoch to epoch, with the batches of new ones
    cfg.DATALOADER.SAMPLE_STREAMS = True  # ours: augmentations are the same for any number of workers; False: a stream a process
    cfg.DATALOADER.K_TRANSFORMS = 1  # augmented copies of each training picture in a batch
    cfg.DATALOADER.RETURN_IMG0 = False  # also give the picture without augmentation
    cfg.DATALOADER.TRAIN_X = CN()
    cfg.DATALOADER.TRAIN_X.SAMPLER = "RandomSampler"
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 32
    cfg.DATALOADER.TRAIN_X.N_DOMAIN = 0  # RandomDomainSampler: domains per batch; 0 = all
    cfg.DATALOADER.TRAIN_X.N_INS = 16  # RandomClassSampler: pictures per class
    cfg.DATALOADER.TRAIN_U = CN()
    cfg.DATALOADER.TRAIN_U.SAME_AS_X = True
    cfg.DATALOADER.TRAIN_U.SAMPLER = "RandomSampler"
    cfg.DATALOADER.TRAIN_U.BATCH_SIZE = 32
    cfg.DATALOADER.TRAIN_U.N_DOMAIN = 0
    cfg.DATALOADER.TRAIN_U.N_INS = 16
    cfg.DATALOADER.TEST = CN()
    cfg.DATALOADER.TEST.SAMPLER = "SequentialSampler"
    cfg.DATALOADER.TEST.BATCH_SIZE = 32

    cfg.MODEL = CN()
    cfg.MODEL.INIT_WEIGHTS = ""  # file with learned tensors to start from
    cfg.MODEL.BACKBONE = CN()
    cfg.MODEL.BACKBONE.NAME = ""  # tiny-en, tiny-vit, CoOp's names (ViT-B/16), or any open_clip model
    cfg.MODEL.BACKBONE.PRETRAINED = True  # False: random weights (tests, benchmarks)
    cfg.MODEL.BACKBONE.TAG = ""  # ours: open_clip's pretrained tag (laion2b_s34b_b88k); "" = OpenAI's weights
    cfg.MODEL.BACKBONE.WEIGHTS = ""  # ours: local file (OpenAI archive, state dict, safetensors) instead of a download
    cfg.MODEL.CLASS_CHUNK = 0  # ours: classes in memory at a time, the rest is computed again (exact, slower); 0 = all
    cfg.MODEL.SPARSE_EXPERTS = True  # ours: encode only experts that some picture of the batch chose, where no loss needs others
    cfg.MODEL.COMPILE = False  # ours: torch.compile the layers of both towers; a minute at the start
    cfg.MODEL.PLAIN_TOWERS = False  # ours: every token through every layer, as the authors' code does; slow, to compare
    cfg.MODEL.HEAD = CN()
    cfg.MODEL.HEAD.NAME = ""
    cfg.MODEL.HEAD.HIDDEN_LAYERS = ()
    cfg.MODEL.HEAD.ACTIVATION = "relu"
    cfg.MODEL.HEAD.BN = True
    cfg.MODEL.HEAD.DROPOUT = 0.0

    cfg.OPTIM = CN()
    cfg.OPTIM.NAME = "adam"  # adam | amsgrad | sgd | rmsprop | radam | adamw
    cfg.OPTIM.LR = 0.0003
    cfg.OPTIM.WEIGHT_DECAY = 5e-4
    cfg.OPTIM.MOMENTUM = 0.9
    cfg.OPTIM.SGD_DAMPNING = 0  # Dassl's spelling
    cfg.OPTIM.SGD_NESTEROV = False
    cfg.OPTIM.RMSPROP_ALPHA = 0.99
    cfg.OPTIM.ADAM_BETA1 = 0.9
    cfg.OPTIM.ADAM_BETA2 = 0.999
    cfg.OPTIM.STAGED_LR = False  # True: layers outside NEW_LAYERS learn at LR * BASE_LR_MULT
    cfg.OPTIM.NEW_LAYERS = ()
    cfg.OPTIM.BASE_LR_MULT = 0.1
    cfg.OPTIM.LR_SCHEDULER = "single_step"  # single_step | multi_step | cosine
    cfg.OPTIM.STEPSIZE = (-1,)  # epochs; below 1 = MAX_EPOCH
    cfg.OPTIM.GAMMA = 0.1
    cfg.OPTIM.MAX_EPOCH = 10
    cfg.OPTIM.WARMUP_EPOCH = -1  # epochs; below 1 = no warm-up
    cfg.OPTIM.WARMUP_TYPE = "linear"  # linear | constant
    cfg.OPTIM.WARMUP_CONS_LR = 1e-5
    cfg.OPTIM.WARMUP_MIN_LR = 1e-5
    cfg.OPTIM.WARMUP_RECOUNT = True  # the schedule after the warm-up counts from 0

    cfg.TRAIN = CN()
    cfg.TRAIN.CHECKPOINT_FREQ = 0  # epochs between checkpoints; 0 = only the last
    cfg.TRAIN.PRINT_FREQ = 10  # batches between log lines
    cfg.TRAIN.COUNT_ITER = "train_x"
    cfg.TRAIN.CLIP_GRAD_NORM = 0.0  # ours: largest gradient norm; 0 = not clipped

    cfg.TEST = CN()
    cfg.TEST.EVALUATOR = "Classification"
    cfg.TEST.PER_CLASS_RESULT = False
    cfg.TEST.COMPUTE_CMAT = False
    cfg.TEST.NO_TEST = False
    cfg.TEST.SPLIT = "test"  # test | val
    cfg.TEST.FINAL_MODEL = "last_step"  # last_step | best_val

    cfg.TRAINER = CN()
    cfg.TRAINER.NAME = ""  # a name of the trainer registry
    cfg.TRAINER.PREC = "fp32"  # ours, for every prompt trainer: fp32 | amp (fp16 on CUDA) | bf16
    return cfg


def get_cfg() -> CN:
    """Return a new config tree with the nodes of every registered trainer and component, and of plugins' ``extend_config``."""
    from promptmix.plugin_manager import get_plugin_manager
    from promptmix.registry import ROLES, TRAINER_REGISTRY

    plugins = get_plugin_manager()
    cfg = get_cfg_default()
    for role, registry in ROLES.items():
        cfg[role] = CN()
        cfg[role].NAME = ""  # "" = the trainer's own choice; "none" = do without
        _add_nodes(cfg[role], registry)
    _add_nodes(cfg.TRAINER, TRAINER_REGISTRY)
    plugins.hook.extend_config(cfg=cfg)
    return cfg


def _add_nodes(parent: CN, registry: Registry) -> None:
    for name in registry:
        node = CN()
        getattr(registry.get(name), "add_config", lambda node: None)(node)
        parent[name.upper()] = node


def merge_file(cfg: CN, path: str | Path) -> None:
    """Merge a YAML file into ``cfg``; a ``_BASE_`` key names a file, relative to it, that is merged first.

    Raises:
        ConfigError: the file is missing or not YAML, or holds an unknown key, a wrong type or an empty value.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not valid YAML: {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold a tree of keys, not {type(tree).__name__}")
    base = tree.pop("_BASE_", None)
    if base is not None:
        merge_file(cfg, path.parent / str(base))
    merge_tree(cfg, tree, str(path))


def merge_tree(cfg: CN, tree: dict[str, Any], source: str) -> None:
    """Merge a tree of plain values, as a YAML file or ``results.json`` holds it, into ``cfg``.

    Raises:
        ConfigError: an unknown key, a wrong type or an empty value.
    """
    for key, value in _leaves(tree, cfg):
        _set(cfg, key, value, source)


def merge_opts(cfg: CN, opts: Sequence[Any], source: str = "command line") -> None:
    """Merge ``KEY VALUE`` pairs into ``cfg``; values are text as typed on a command line, or what it stands for.

    Raises:
        ConfigError: a key without a value, an unknown key, or a value of the wrong type.
    """
    if len(opts) % 2:
        raise ConfigError(f"{source}: overrides come as KEY VALUE pairs, but {opts[-1]!r} has no value")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        _set(cfg, key, _literal(text) if isinstance(text, str) else text, source)


def source_of(cfg: CN, key: str) -> str | None:
    """Return who set ``key`` (a file or ``command line``), or None where the default stands."""
    return cfg.__dict__.get("_sources", {}).get(key)


def reset(cfg: CN, keys: Sequence[str], source: str | None) -> None:
    """Give each of ``keys`` that ``source`` set its default back."""
    default = get_cfg_default()
    for key in keys:
        if source is not None and source_of(cfg, key) == source:
            node, leaf = key.rpartition(".")[::2]
            get_key(cfg, node)[leaf] = get_key(default, key)
            del cfg.__dict__["_sources"][key]


def sources(cfg: CN) -> dict[str, str]:
    """Return every key that was set, with who set it."""
    return dict(cfg.__dict__.get("_sources", {}))


def validate(cfg: CN) -> None:
    """Check the merged tree: names, choices, settings that nobody would read, then the trainer's and the plugins' own checks.

    Raises:
        RegistryError: no trainer or data set of this name.
        ConfigError: a value that is not among its key's choices, or a setting that the chosen trainer would ignore.
    """
    from promptmix.plugin_manager import get_plugin_manager
    from promptmix.registry import DATASET_REGISTRY, ROLES, TRAINER_REGISTRY

    trainer = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    DATASET_REGISTRY.get(cfg.DATASET.NAME)
    for key, allowed in CHOICES.items():
        value = get_key(cfg, key)
        if value not in allowed:
            raise ConfigError(f"{key} is {value!r}; choose from {', '.join(map(repr, allowed))}")
    _refuse_strangers(cfg, "TRAINER", cfg.TRAINER.NAME)
    own = getattr(trainer, "roles", {})
    for role, registry in ROLES.items():
        if role not in cfg:
            continue  # a tree of Dassl's form, which has no mixtures
        if role not in own and cfg[role].NAME:
            raise ConfigError(f"{role}.NAME is {cfg[role].NAME!r}, but {cfg.TRAINER.NAME} has no such role; remove the key")
        chosen = (cfg[role].NAME or own[role]) if role in own else "none"
        names = [name for _, name in parse_sum(chosen)] if chosen not in ("", "none") else []
        for name in names:
            getattr(registry.get(name), "check_settings", lambda cfg, node: None)(cfg, f"{role}.{name.upper()}")
        _refuse_strangers(cfg, role, *names)
    getattr(trainer, "validate", lambda cfg: None)(cfg)
    get_plugin_manager().hook.validate_config(cfg=cfg)


def _refuse_strangers(cfg: CN, group: str, *chosen: str) -> None:
    """Refuse keys under ``group`` of another method than ``chosen``, unless the file that sets them serves several methods."""
    for source, written in cfg.__dict__.get("_written", {}).items():
        keys = [key for key in written if key.startswith(f"{group}.") and key.count(".") > 1]
        own = tuple(f"{group}.{name.upper()}." for name in chosen)
        strangers = [key for key in keys if not key.startswith(own)]
        # A role's settings in a file belong to the trainer they are written beside, so any file may carry them.
        methods = {key.split(".")[1] for key in keys}
        shared = source != "command line" and (len(strangers) < len(keys) or len(methods) > 1 or group != "TRAINER")
        if strangers and not shared:
            raise ConfigError(
                f"{strangers[0]} (set by {source}) would be ignored: {cfg.TRAINER.NAME} reads "
                + (" and ".join(f"{prefix}*" for prefix in own) if own else f"no key under {group}")
                + "; remove it or choose the trainer it belongs to"
            )


def _leaves(tree: dict[str, Any], cfg: CN, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of every leaf of ``tree``; a mapping is a node only where ``cfg`` has a node."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        node = cfg.get(name) if isinstance(cfg, CN) else None
        if isinstance(value, dict) and isinstance(node, CN):
            found += _leaves(value, node, key + ".")
        else:
            found.append((key, value))
    return found


def get_key(cfg: CN, key: str) -> Any:  # noqa: ANN401
    """Return the value at a dotted key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _set(cfg: CN, key: str, value: Any, source: str) -> None:  # noqa: ANN401
    *parents, leaf = str(key).split(".")
    node: Any = cfg
    for depth, part in enumerate([*parents, leaf]):
        names = list(node) if isinstance(node, CN) else []
        if part not in names:
            where = f"under {'.'.join(parents[:depth])}" if depth else "at the top of the tree"
            shown = f" (keys {where}: {', '.join(names)})" if names else ""
            raise ConfigError(f"{source}: unknown config key {key!r}{closest(part, names)}{shown}")
        if depth < len(parents):
            node = node[part]
    old = node[leaf]
    if isinstance(old, CN):
        raise ConfigError(f"{source}: {key} is a group of keys ({', '.join(old)}), not a value; set one of them")
    node[leaf] = _coerce(key, value, old, source)
    cfg.__dict__.setdefault("_sources", {})[key] = source
    cfg.__dict__.setdefault("_written", {}).setdefault(source, []).append(key)  # also what is overwritten later


def _coerce(key: str, value: Any, old: Any, source: str) -> Any:  # noqa: ANN401
    """Return ``value`` in the type of ``old``; ints become floats, lists and tuples change into each other."""
    if value is None or isinstance(value, dict):
        shown = "empty (None)" if value is None else "a mapping"
        raise ConfigError(f"{source}: {key} is {shown}; give a {type(old).__name__} such as {old!r}, or leave the key out")
    if type(value) is type(old):
        return value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, float) and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    if isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(old)(value)
    if isinstance(old, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(
        f"{source}: {key} is {value!r} ({type(value).__name__}), but must be a {type(old).__name__} such as {old!r}"
    )


def _literal(text: str) -> Any:  # noqa: ANN401
    """Return the Python literal that ``text`` writes (number, tuple, list, True, None), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
