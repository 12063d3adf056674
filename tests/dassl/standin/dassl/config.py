from yacs.config import CfgNode as CN


def get_cfg_default():
    """Dassl's default tree; promptmix's own keys are not in it."""
    from promptmix.config import get_cfg_default as ours

    cfg = ours()
    for node, key in (
        (cfg, "DEVICE"),
        (cfg.DATASET, "SUBSAMPLE_CLASSES"),
        (cfg.INPUT, "CACHED_VIEWS"),
        (cfg.MODEL.BACKBONE, "WEIGHTS"),
        (cfg.MODEL.BACKBONE, "TAG"),
        (cfg.TRAIN, "CLIP_GRAD_NORM"),
        (cfg.TRAINER, "PREC"),
    ):
        del node[key]
    assert isinstance(cfg, CN)
    return cfg
