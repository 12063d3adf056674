"""Every key that no method and no plugin brings: default, meaning and what it takes, in one place."""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode as CN

from promptmix.config.declare import Setting, declare

#: What ``INPUT.TRANSFORMS`` may name.
TRANSFORMS = (
    *("random_flip", "random_resized_crop", "normalize", "instance_norm", "random_crop", "random_translation"),
    "center_crop",  # evaluation does it always; allowed here because configs name it
    *("cutout", "imagenet_policy", "cifar10_policy", "svhn_policy", "randaugment", "randaugment_fixmatch", "randaugment2"),
    *("gaussian_noise", "colorjitter", "randomgrayscale", "gaussian_blur"),
)
#: ``open`` has the pictures of ``all``; the model counts as trained on the base classes.
CLASSES = ("all", "base", "new", "open")
READINGS = ("benchmark", "upright")
PIPELINES = ("exact", "fast")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
SAMPLERS = ("RandomSampler", "SequentialSampler", "RandomDomainSampler", "SeqDomainSampler", "RandomClassSampler")
OPTIMIZERS = ("adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw")
ADAMS = tuple(name for name in OPTIMIZERS if "adam" in name or name == "amsgrad")
SCHEDULES = ("single_step", "multi_step", "cosine")
WARMUPS = ("linear", "constant")
PRECISIONS = ("fp32", "amp", "bf16")
ATTENTIONS = ("packed", "flex")
STEPS = ("eager", "compiled", "cuda_graph")
DEVICES = ("auto", "cpu", "cuda")

_SHARE = {"low": 0, "high": 1}
_RATE = {"low": 0, "high": 1e30}  # Adam divides by as little as 1 - beta, which 32 bits must hold
_MANY = 2**31 - 1  # a count that no run reaches; more is a slip of the keyboard
_POSITIVE = range(1, _MANY + 1)


def get_cfg_default() -> CN:
    """Return a new config tree with Dassl's keys and defaults and promptmix's own, without any method's node."""
    # Defaults are those of Dassl.pytorch (commit c61a1b5); keys marked "ours" are not Dassl's.
    cfg = CN()
    _add_run(cfg)
    _add_input(cfg)
    _add_data(cfg)
    _add_model(cfg)
    _add_training(cfg)
    return cfg


def _key(cfg: CN, path: str, default: Any, comment: str, **limits: Any) -> None:
    """Declare the key at a dotted path, with the nodes above it."""
    *nodes, name = path.split(".")
    node = cfg
    for part in nodes:
        if part not in node:
            node[part] = CN()
        node = node[part]
    declare(node, name, default, Setting(comment, **limits))


def _with(key: str, *values: Any) -> dict[str, Any]:
    """Return the limit that a key is read with these values of another one."""
    return {"needs": ((key, values),)}


def _for(transform: str) -> dict[str, Any]:
    """Return the limit that a key is read with an augmentation of this name, or one that begins so."""
    return _with("INPUT.TRANSFORMS", transform)


def _add_run(cfg: CN) -> None:
    _key(cfg, "VERSION", 1, "Dassl's version of the tree; nobody reads it")
    _key(cfg, "OUTPUT_DIR", "./output", "folder for log.txt, results.json and checkpoints")
    _key(cfg, "RESUME", "", 'folder of an earlier run to continue from; "" looks in OUTPUT_DIR')
    _key(cfg, "SEED", -1, "of all random numbers; negative: not seeded", high=2**32 - 1)  # numpy takes 32 bits
    _key(cfg, "USE_CUDA", True, "False keeps everything on the CPU (Dassl's key; DEVICE is finer)")
    _key(cfg, "DEVICE", "auto", "ours: where to compute; auto: CUDA where there is a GPU", choices=DEVICES)
    cfg.LOGGER = CN()  # logger plugins add their nodes
    _key(cfg, "VERBOSE", True, "print the data set table and parameter counts")


def _add_input(cfg: CN) -> None:
    # The largest picture is a limit of memory only: 8192 pixels a side are 800 MB in float32.
    _key(cfg, "INPUT.SIZE", (224, 224), "pixels, height and width", low=1, high=8192, length=2)
    _key(cfg, "INPUT.INTERPOLATION", "bilinear", "how pictures are resized", choices=INTERPOLATIONS)
    comment = "ours: upright: EXIF turns, transparent on white; benchmark: as CoOp reads; auto: upright for ImageFolder and CSV"
    _key(cfg, "INPUT.READING", "auto", comment, choices=("auto", *READINGS))
    _key(cfg, "INPUT.TRANSFORMS", (), "augmentations, see promptmix.data.reading.transforms", items=str, choices=TRANSFORMS)
    _key(cfg, "INPUT.NO_TRANSFORM", False, "True: batches carry untransformed pictures")
    _key(cfg, "INPUT.PIXEL_MEAN", [0.485, 0.456, 0.406], "subtracted from red, green, blue", length=3)
    _key(cfg, "INPUT.PIXEL_STD", [0.229, 0.224, 0.225], "red, green, blue are divided by it", above=0, length=3)
    _key(cfg, "INPUT.CROP_PADDING", 4, "pixels", low=0, high=8192, **_for("random_crop"))
    crop = _for("random_resized_crop")
    _key(cfg, "INPUT.RRCROP_SCALE", (0.08, 1.0), "share of the area kept", above=0, high=1, length=2, **crop)
    _key(cfg, "INPUT.CUTOUT_N", 1, "squares", low=0, high=10_000, **_for("cutout"))
    _key(cfg, "INPUT.CUTOUT_LEN", 16, "side in pixels", low=0, high=8192, **_for("cutout"))
    _key(cfg, "INPUT.GN_MEAN", 0.0, "mean", **_for("gaussian_noise"))
    _key(cfg, "INPUT.GN_STD", 0.15, "deviation", low=0, **_for("gaussian_noise"))
    _key(cfg, "INPUT.RANDAUGMENT_N", 2, "operations a picture", low=0, high=1000, **_for("randaugment"))
    _key(cfg, "INPUT.RANDAUGMENT_M", 10, "magnitude", low=0, high=30, **_for("randaugment"))
    _key(cfg, "INPUT.COLORJITTER_B", 0.4, "brightness", low=0, **_for("colorjitter"))
    _key(cfg, "INPUT.COLORJITTER_C", 0.4, "contrast", low=0, **_for("colorjitter"))
    _key(cfg, "INPUT.COLORJITTER_S", 0.4, "saturation", low=0, **_for("colorjitter"))
    _key(cfg, "INPUT.COLORJITTER_H", 0.1, "hue", low=0, high=0.5, **_for("colorjitter"))
    _key(cfg, "INPUT.RGS_P", 0.2, "probability", **_SHARE, **_for("randomgrayscale"))
    _key(cfg, "INPUT.GB_P", 0.5, "probability", **_SHARE, **_for("gaussian_blur"))
    _key(cfg, "INPUT.GB_K", 21, "kernel in pixels, odd", low=1, high=8191, **_for("gaussian_blur"))
    comment = "ours: train on K precomputed views a picture when the image tower is frozen; 0 = off"
    _key(cfg, "INPUT.CACHED_VIEWS", 0, comment, low=0, high=_MANY)
    comment = "ours: keep features of evaluation pictures and cached views on disk, if the tower is frozen"
    _key(cfg, "INPUT.FEATURE_CACHE", True, comment)
    _key(cfg, "INPUT.FEATURE_CACHE_DIR", "", 'ours: folder; "" = PROMPTMIX_CACHE_DIR, else the user\'s cache folder')
    comment = "ours: what was not used for longest goes first; 0 = no limit"
    _key(cfg, "INPUT.FEATURE_CACHE_GB", 5.0, comment, low=0, **_with("INPUT.FEATURE_CACHE", True))
    comment = "ours: fast: training pictures through torchvision's kernels, large JPEGs decoded smaller; other numbers"
    _key(cfg, "INPUT.PIPELINE", "exact", comment, choices=PIPELINES)
    comment = "ours: decode training pictures once, into a folder beside the features; batches stay the same to the bit"
    _key(cfg, "INPUT.PICTURE_CACHE", False, comment)
    comment = "ours: what was not used for longest goes first; 0 = no limit"
    _key(cfg, "INPUT.PICTURE_CACHE_GB", 20.0, comment, low=0, **_with("INPUT.PICTURE_CACHE", True))


def _add_data(cfg: CN) -> None:
    _key(cfg, "DATASET.ROOT", "", "folder of the data sets")
    _key(cfg, "DATASET.NAME", "", "a name of the dataset registry")
    _key(cfg, "DATASET.SOURCE_DOMAINS", (), "domains to train on; () = all", items=str)
    _key(cfg, "DATASET.TARGET_DOMAINS", (), "domains to test on; () = the source domains", items=str)
    _key(cfg, "DATASET.NUM_LABELED", -1, "semi-supervised sets: labelled items in total", low=-1, high=_MANY)
    _key(cfg, "DATASET.NUM_SHOTS", -1, "training pictures per class; below 1 = all", low=-1, high=_MANY)
    _key(cfg, "DATASET.VAL_PERCENT", 0.1, "Dassl's data sets: share of the training part to validate on", **_SHARE)
    _key(cfg, "DATASET.STL10_FOLD", -1, "Dassl's STL10: fold; -1 = all", low=-1, high=9)
    _key(cfg, "DATASET.CIFAR_C_TYPE", "", "Dassl's CIFAR-C: corruption")
    _key(cfg, "DATASET.CIFAR_C_LEVEL", 1, "Dassl's CIFAR-C: its strength", low=1, high=5)
    _key(cfg, "DATASET.ALL_AS_UNLABELED", False, "Dassl's semi-supervised sets: labelled items are unlabelled ones too")
    comment = "CoOp's key: half of the classes; open (ours): test prompts of the base classes on all"
    _key(cfg, "DATASET.SUBSAMPLE_CLASSES", "all", comment, choices=CLASSES)
    comment = "ours: groups of templates in place of the data set's own; () = its own"
    _key(cfg, "DATASET.TEMPLATE_GROUPS", (), comment, items=(list, tuple))
    comment = 'ours: JSON file of sentences about each class, or a folder with <data set>.json; "" = the data set\'s own, if any'
    _key(cfg, "DATASET.DESCRIPTIONS", "", comment)
    comment = 'ours: JSON file, {"train": [...], "test": [...]}: numbers of the pictures to use; "" = all'
    _key(cfg, "DATASET.SUBSET", "", comment)
    comment = "ours: training pictures without labels: all shots of the run's classes, or of all classes, new ones too"
    _key(cfg, "DATASET.UNLABELED", "none", comment, choices=("none", "classes", "all"))
    comment = "ours: seeded: class order drawn from SEED, so that base and new differ by seed"
    parted = _with("DATASET.SUBSAMPLE_CLASSES", *CLASSES[1:])
    _key(cfg, "DATASET.CLASS_ORDER", "sorted", comment, choices=("sorted", "seeded"), **parted)

    _key(cfg, "DATALOADER.NUM_WORKERS", 4, "processes that read pictures; 0 = none beside this one", low=0, high=1024)
    comment = "ours: training workers stay from epoch to epoch, with the batches of new ones"
    _key(cfg, "DATALOADER.PERSISTENT_WORKERS", True, comment, needs=(("DATALOADER.NUM_WORKERS", _POSITIVE),))
    comment = "ours: augmentations are the same for any number of workers; False: a stream a process"
    _key(cfg, "DATALOADER.SAMPLE_STREAMS", True, comment)
    _key(cfg, "DATALOADER.K_TRANSFORMS", 1, "augmented copies of each training picture in a batch", low=1, high=10_000)
    _key(cfg, "DATALOADER.RETURN_IMG0", False, "also give the picture without augmentation")
    for part in ("TRAIN_X", "TRAIN_U"):
        at = f"DATALOADER.{part}."
        if part == "TRAIN_U":
            _key(cfg, at + "SAME_AS_X", True, "the unlabelled part is read as the labelled one")
        _key(cfg, at + "SAMPLER", "RandomSampler", "order of the pictures", choices=SAMPLERS)
        _key(cfg, at + "BATCH_SIZE", 32, "pictures", low=1, high=_MANY)
        domains = _with(at + "SAMPLER", "RandomDomainSampler", "SeqDomainSampler")
        _key(cfg, at + "N_DOMAIN", 0, "domains per batch; 0 = all", low=0, high=_MANY, **domains)
        _key(cfg, at + "N_INS", 16, "pictures per class", low=1, high=_MANY, **_with(at + "SAMPLER", "RandomClassSampler"))
    _key(cfg, "DATALOADER.TEST.SAMPLER", "SequentialSampler", "order of the pictures", choices=SAMPLERS)
    _key(cfg, "DATALOADER.TEST.BATCH_SIZE", 32, "pictures", low=1, high=_MANY)


def _add_model(cfg: CN) -> None:
    _key(cfg, "MODEL.INIT_WEIGHTS", "", "file with learned tensors to start from")
    _key(cfg, "MODEL.BACKBONE.NAME", "", "tiny-en, tiny-vit, CoOp's names (ViT-B/16), or any open_clip model")
    _key(cfg, "MODEL.BACKBONE.PRETRAINED", True, "False: random weights (tests, benchmarks)")
    comment = "ours: open_clip's pretrained tag (laion2b_s34b_b88k); \"\" = OpenAI's weights"
    _key(cfg, "MODEL.BACKBONE.TAG", "", comment)
    comment = "ours: local file (OpenAI archive, state dict, safetensors) instead of a download"
    _key(cfg, "MODEL.BACKBONE.WEIGHTS", "", comment)
    comment = "ours: folder with the tokenizer's files, for models that don't use CLIP's; '' = downloaded once"
    _key(cfg, "MODEL.BACKBONE.TOKENIZER", "", comment)
    comment = "ours: classes in memory at a time, the rest is computed again (exact, slower); 0 = all"
    _key(cfg, "MODEL.CLASS_CHUNK", 0, comment, low=0, high=_MANY)
    comment = "ours: texts of chosen experts alone, pictures by those they chose alone, where no loss needs others"
    _key(cfg, "MODEL.SPARSE_EXPERTS", True, comment)
    _key(cfg, "MODEL.COMPILE", False, "ours: torch.compile the layers of both towers; a minute at the start")
    comment = "ours: of packed prompts; flex: PyTorch's FlexAttention, which learns on a GPU only and was never timed on one"
    _key(cfg, "MODEL.ATTENTION", "packed", comment, choices=ATTENTIONS)
    comment = "ours: every token through every layer, as the authors' code does; slow, to compare"
    _key(cfg, "MODEL.PLAIN_TOWERS", False, comment)
    _key(cfg, "MODEL.HEAD.NAME", "", "head of Dassl's trainers")
    _key(cfg, "MODEL.HEAD.HIDDEN_LAYERS", (), "its widths", items=int, low=1, high=_MANY)
    _key(cfg, "MODEL.HEAD.ACTIVATION", "relu", "its activation")
    _key(cfg, "MODEL.HEAD.BN", True, "it has batch norms")
    _key(cfg, "MODEL.HEAD.DROPOUT", 0.0, "its dropout", low=0, below=1)


def _add_training(cfg: CN) -> None:
    _key(cfg, "OPTIM.NAME", "adam", "optimizer", choices=OPTIMIZERS)
    _key(cfg, "OPTIM.LR", 0.0003, "learning rate", **_RATE)
    _key(cfg, "OPTIM.WEIGHT_DECAY", 5e-4, "of every learned tensor", **_RATE)
    momentum = _with("OPTIM.NAME", "sgd", "rmsprop")
    _key(cfg, "OPTIM.MOMENTUM", 0.9, "share of the last step that is taken again", **_SHARE, **momentum)
    _key(cfg, "OPTIM.SGD_DAMPNING", 0, "dampening, in Dassl's spelling", low=0, high=_MANY, **_with("OPTIM.NAME", "sgd"))
    _key(cfg, "OPTIM.SGD_NESTEROV", False, "Nesterov's momentum", **_with("OPTIM.NAME", "sgd"))
    _key(cfg, "OPTIM.RMSPROP_ALPHA", 0.99, "smoothing", **_SHARE, **_with("OPTIM.NAME", "rmsprop"))
    adam = _with("OPTIM.NAME", *ADAMS)
    _key(cfg, "OPTIM.ADAM_BETA1", 0.9, "decay of the mean", low=0, below=1, **adam)
    _key(cfg, "OPTIM.ADAM_BETA2", 0.999, "decay of the second moment", low=0, below=1, **adam)
    _key(cfg, "OPTIM.ADAM_EPS", 1e-8, "added to the root of the second moment", above=0, **adam)
    _key(cfg, "OPTIM.STAGED_LR", False, "True: layers outside NEW_LAYERS learn at LR * BASE_LR_MULT")
    _key(cfg, "OPTIM.NEW_LAYERS", (), "names of layers", items=str)
    staged = _with("OPTIM.STAGED_LR", True)
    _key(cfg, "OPTIM.BASE_LR_MULT", 0.1, "factor on the learning rate of layers outside NEW_LAYERS", **_RATE, **staged)
    _key(cfg, "OPTIM.LR_SCHEDULER", "single_step", "learning rate over the epochs", choices=SCHEDULES)
    steps = _with("OPTIM.LR_SCHEDULER", "multi_step", "single_step")
    _key(cfg, "OPTIM.STEPSIZE", (-1,), "epochs; single_step: below 1 = MAX_EPOCH", items=int, low=-1, high=_MANY, **steps)
    _key(cfg, "OPTIM.GAMMA", 0.1, "factor of a step", **_RATE, **steps)
    _key(cfg, "OPTIM.MAX_EPOCH", 10, "epochs", low=1, high=_MANY)
    _key(cfg, "OPTIM.WARMUP_EPOCH", -1, "epochs; below 1 = no warm-up", low=-1, high=_MANY)
    warm = ("OPTIM.WARMUP_EPOCH", _POSITIVE)
    _key(cfg, "OPTIM.WARMUP_TYPE", "linear", "learning rate over the warm-up", choices=WARMUPS, needs=(warm,))
    needs = (warm, ("OPTIM.WARMUP_TYPE", ("constant",)))
    _key(cfg, "OPTIM.WARMUP_CONS_LR", 1e-5, "the learning rate of the warm-up", **_RATE, needs=needs)
    needs = (warm, ("OPTIM.WARMUP_TYPE", ("linear",)))
    _key(cfg, "OPTIM.WARMUP_MIN_LR", 1e-5, "learning rate of the first epoch", **_RATE, needs=needs)
    _key(cfg, "OPTIM.WARMUP_RECOUNT", True, "the schedule after the warm-up counts from 0", needs=(warm,))

    _key(cfg, "TRAIN.CHECKPOINT_FREQ", 0, "epochs between checkpoints; below 1 = only the last", low=-1, high=_MANY)
    _key(cfg, "TRAIN.PRINT_FREQ", 10, "batches between log lines", low=1, high=_MANY)
    comment = "length of an epoch with unlabelled data"
    _key(cfg, "TRAIN.COUNT_ITER", "train_x", comment, choices=("train_x", "train_u", "smaller_one"))
    _key(cfg, "TRAIN.CLIP_GRAD_NORM", 0.0, "ours: largest gradient norm; 0 = not clipped", low=0)

    comment = (
        "ours: only kernels that repeat to the bit on a GPU, where others add up in any order; slower; a CPU repeats without"
    )
    _key(cfg, "TRAIN.DETERMINISTIC", False, comment)

    comment = "ours: compiled: the whole step through torch.compile, a minute at the start; cuda_graph: and replayed by CUDA"
    _key(cfg, "TRAIN.STEP", "eager", comment, choices=STEPS)

    _key(cfg, "TEST.EVALUATOR", "Classification", "a name of the evaluator registry")
    _key(cfg, "TEST.PER_CLASS_RESULT", False, "also print every class")
    tested = _with("TEST.NO_TEST", False)
    _key(cfg, "TEST.COMPUTE_CMAT", False, "also write the confusion matrix, cmat.pt")
    comment = "ours: classes kept of each test picture in predictions.npz, most probable first; 0 = no such file"
    _key(cfg, "TEST.PREDICTIONS", 5, comment, low=0, high=_MANY, **tested)
    _key(cfg, "TEST.NO_TEST", False, "True: no test after training")
    _key(cfg, "TEST.SPLIT", "test", "what is evaluated", choices=("test", "val"), **tested)
    comment = "which epoch is tested: the last, or the best on the validation part"
    _key(cfg, "TEST.FINAL_MODEL", "last_step", comment, choices=("last_step", "best_val"))

    _key(cfg, "TRAINER.NAME", "", "a name of the trainer registry")
    comment = "ours, for every prompt trainer: computing precision; amp: fp16 on CUDA"
    _key(cfg, "TRAINER.PREC", "fp32", comment, choices=PRECISIONS)
