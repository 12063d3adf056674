"""``promptmix train``: one run, with every flag of CoOp's train.py."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from promptmix.config.flags import check_count, make_config
from promptmix.errors import ConfigError
from promptmix.parallel import launch

if TYPE_CHECKING:
    from yacs.config import CfgNode

#: Flag to config key, as in CoOp.
FLAGS = {
    "--root": "DATASET.ROOT",
    "--skip-bad": "DATASET.SKIP_BAD",
    "--output-dir": "OUTPUT_DIR",
    "--resume": "RESUME",
    "--seed": "SEED",
    "--source-domains": "DATASET.SOURCE_DOMAINS",
    "--target-domains": "DATASET.TARGET_DOMAINS",
    "--transforms": "INPUT.TRANSFORMS",
    "--trainer": "TRAINER.NAME",
    "--backbone": "MODEL.BACKBONE.NAME",
    "--head": "MODEL.HEAD.NAME",
    "--device": "DEVICE",
}
_TOP_KEYS = ("OUTPUT_DIR", "RESUME", "SEED", "USE_CUDA", "DEVICE", "VERBOSE", "VERSION")
_KEY = re.compile(rf"[A-Z][A-Z0-9_]*(\.\w+)+|{'|'.join(_TOP_KEYS)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("--root", default="", help="folder of the data sets")
    add("--skip-bad", action="store_const", const=True, help="leave out missing or damaged pictures instead of stopping")
    add("--output-dir", default="", help="folder for log.txt, results.json and checkpoints")
    add("--resume", default="", metavar="DIR", help="output folder of an earlier run, whose training goes on")
    add("--seed", type=int, help="seed of all random numbers; negative = not seeded")
    add("--source-domains", nargs="+", metavar="DOMAIN", help="domains to train on")
    add("--target-domains", nargs="+", metavar="DOMAIN", help="domains to test on")
    add("--transforms", nargs="+", metavar="NAME", help="augmentations")
    add("--config-file", default="", metavar="YAML", help="method's config; shipped ones are found from any folder")
    add("--dataset-config-file", default="", metavar="YAML", help="data set's config, merged before --config-file")
    add(
        "--from-run",
        default="",
        metavar="DIR",
        help="config of an earlier run, in place of config files; it goes on, or is done again",
    )
    add("--trainer", default="", help="name of the method, see `promptmix list trainers`")
    add("--backbone", default="", help="name of the CLIP model, see `promptmix list backbones`")
    add("--head", default="", help="name of a head (methods of Dassl)")
    add("--eval-only", action="store_true", help="test only")
    add("--model-dir", default="", metavar="DIR", help="output folder of the run to test, with --eval-only")
    add("--load-epoch", type=int, metavar="N", help="test the checkpoint of this epoch; default: the best one")
    add("--no-train", action="store_true", help="build everything, but do not train")
    add("--coop-repo", default="", metavar="DIR", help="run a trainer of this checkout of CoOp or one of its forks, as it is")
    add(
        "--dassl",
        metavar="ours|theirs|DIR",
        help="with --coop-repo: promptmix's engine, the checkout's own Dassl (or an installed one), or the Dassl in this folder",
    )
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")
    add("--device", type=_device, metavar="auto|cpu|cuda[:N]", help="where to compute; N = which of several GPUs")
    add_devices(parser)
    add("--threads", type=int, metavar="N", help="CPU threads; default: as PyTorch chooses")
    add("--quiet", action="store_true", help="print nothing but errors; log.txt has it all")
    add("--list", action="store_true", help="show what is registered, as `promptmix list` does")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides at the end (OPTIM.MAX_EPOCH 5)")


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from auto, cpu, cuda, cuda:N)")
    return text


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Declare ``--devices``, which ``start_devices`` takes."""
    parser.add_argument(
        "--devices",
        "--gpus",
        type=int,
        metavar="N",
        help="train in N processes, each with a GPU of its own (with --device cpu: a part of the CPU)",
    )


def start_devices(args: argparse.Namespace) -> int | None:
    """Run the command in as many processes as ``--devices`` says.

    Returns:
        Their exit code; None where the command goes on in this process, which then sees the GPU that is its own.

    Raises:
        ConfigError: no number of processes, another one than ``torchrun`` has, or fewer GPUs than processes.
    """
    launch.refuse_wrong_place()
    if args.devices is not None:
        check_count("--devices", args.devices)
        there = launch.place()[1]
        if 1 < args.devices != there > 1:
            raise ConfigError(f"--devices {args.devices} beside WORLD_SIZE {there} of torchrun; leave --devices out")
        if args.devices > 1 and there == 1:
            return launch.start(args.devices, args.argv)
    launch.take_device()
    return None


def split_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Part the flags from the ``KEY VALUE`` pairs at the end.

    argparse would give the first pair to a preceding flag with many values (``--source-domains a b OPTIM.LR 0.1``) and
    take a negative value for a flag.
    """
    single = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}
    flags, pairs = argv, []
    for index, word in enumerate(argv):
        if _KEY.fullmatch(word) and (index == 0 or argv[index - 1] not in single):
            flags, pairs = argv[:index], argv[index:]
            break
    if any(word.partition("=")[0] == "--coop-repo" for word in flags):
        return _without_unknown(parser, flags), pairs  # the checkout's train.py may know them
    late = next((place for place in range(0, len(pairs), 2) if pairs[place].startswith("--")), None)
    if late is not None:
        parser.error(f"flags come before the KEY VALUE pairs: write {' '.join(pairs[late:])} before {pairs[0]}")
    flags, published = _without_published(parser, flags)
    return flags, [*pairs, *published]


def _without_published(parser: argparse.ArgumentParser, flags: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags without those that the trainer's authors added to theirs, and these as pairs of flag and value."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    flags = [part for flag in flags for part in (flag.split("=", 1) if re.match("--trainer=.", flag) else [flag])]
    at = flags.index("--trainer") + 1 if "--trainer" in flags else len(flags)
    if at >= len(flags) or all(word.partition("=")[0] in known for word in flags if word.startswith("--")):
        return flags, []
    from promptmix.config.published import flags_of
    from promptmix.plugin_manager import get_plugin_manager

    get_plugin_manager()
    theirs, kept, pairs, words = flags_of(flags[at]), list[str](), list[str](), iter(flags)
    for word in words:
        if word in theirs:
            pairs += [word, next(words, "")]
        else:
            kept.append(word)
    return kept, pairs


def _without_unknown(parser: argparse.ArgumentParser, flags: list[str]) -> list[str]:
    """Leave out the flags that ``parser`` doesn't know, with the words that follow them."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    kept, keep = [], True
    for word in flags:
        if word.startswith("-") and word[1:2].isalpha() or word.startswith("--"):
            keep = word.partition("=")[0] in known
        if keep:
            kept.append(word)
    return kept


def run(args: argparse.Namespace) -> int:
    """Merge the config and run.

    Raises:
        UserError: something that can't be done, such as a run without ``--trainer``.
    """
    if args.list:
        if args.opts:
            raise ConfigError(f"--list takes no settings, but got {args.opts[0]!r}; leave it out, or --list")
        from promptmix.commands import list as list_command

        return list_command.show("", args.plugin)
    _refuse_idle_flags(args)
    code = start_devices(args)
    if code is not None:
        return code
    args.device = launch.take_gpu(args.device)
    if launch.place()[1] > 1 and args.coop_repo:
        raise ConfigError("--coop-repo runs another program's trainer, which knows one device; leave --devices out")
    options = _run_options(args)
    set_threads(args.threads)
    if args.coop_repo:
        from promptmix.config.flags import load_plugins
        from promptmix.dassl.checkout import run_checkout

        load_plugins(args.plugin)
        run_checkout(args.coop_repo, args, **options)
        return 0
    flags = {flag: (key, getattr(args, flag[2:].replace("-", "_"))) for flag, key in FLAGS.items()}
    if args.from_run:
        from promptmix.runs.again import read_config

        _refuse_beside_run(args)
        cfg = read_config(args.from_run, flags, args.opts, args.plugin, evaluates=args.eval_only)
    else:
        cfg = make_config([args.dataset_config_file, args.config_file], flags, args.opts, args.plugin)
    check_names(cfg)
    refuse_undivided(cfg.TRAINER.NAME)
    from promptmix.engine.precision import choose_device
    from promptmix.parallel import group
    from promptmix.runs.run import run as run_one

    with group.joined(choose_device(cfg.DEVICE, cfg.USE_CUDA), cfg.TRAINER.NAME):
        run_one(cfg, **options)
    return 0


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    """Refuse flags that another one would leave without effect."""
    for flag, given in (("--model-dir", args.model_dir), ("--load-epoch", args.load_epoch is not None)):
        if given and not args.eval_only:
            raise ConfigError(
                f"{flag} is for --eval-only; to go on with a run give --resume DIR, to start from its tensors "
                "MODEL.INIT_WEIGHTS FILE"
            )
    for flag, given in (("--no-train", args.no_train), ("--resume", args.resume)):
        if given and args.eval_only:
            raise ConfigError(f"{flag} is for a training, and --eval-only only tests; leave one of the two out")
    if args.dassl and not args.coop_repo:
        raise ConfigError(f"--dassl {args.dassl} is for --coop-repo; leave it out, or name a checkout")


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``promptmix.runs.run.Asked``."""
    return {
        "eval_only": args.eval_only,
        "model_dir": args.model_dir,
        "load_epoch": args.load_epoch,
        "no_train": args.no_train,
        "quiet": args.quiet,
        "arguments": {key: value for key, value in vars(args).items() if key not in ("argv", "debug", "list", "quiet")},
        "command": ["promptmix", *args.argv],
        "plugins": tuple(args.plugin),
    }


def _refuse_beside_run(args: argparse.Namespace) -> None:
    """Refuse config files beside ``--from-run``, whose order would be anybody's guess."""
    for flag, given in (("--config-file", args.config_file), ("--dataset-config-file", args.dataset_config_file)):
        if given:
            raise ConfigError(f"{flag} {given} beside --from-run {args.from_run}: leave one out; single keys go at the end")


def refuse_undivided(trainer: str, processes: int | None = None) -> None:
    """Refuse several processes (None = those that this one belongs to) for a trainer without the towers that they share."""
    from promptmix.registry import is_prompt_trainer

    if (launch.place()[1] if processes is None else processes) > 1 and not is_prompt_trainer(trainer):
        raise ConfigError(f"TRAINER.NAME {trainer} is not a prompt trainer, whose towers --devices divides; leave it out")


def set_threads(number: int | None) -> None:
    """Set PyTorch's CPU threads, where a number is given."""
    if number is None:
        return
    check_count("--threads", number)
    import torch

    torch.set_num_threads(number)


def check_names(cfg: CfgNode) -> None:
    """Refuse a run that lacks one of its names.

    Raises:
        ConfigError: no trainer, no data set, or no backbone for a prompt trainer is chosen.
    """
    from promptmix.config import get_key
    from promptmix.registry import is_prompt_trainer

    needed = {"TRAINER.NAME": "--trainer", "DATASET.NAME": "--dataset-config-file"}
    if cfg.TRAINER.NAME and is_prompt_trainer(cfg.TRAINER.NAME):
        needed["MODEL.BACKBONE.NAME"] = "--backbone"
    for key, flag in needed.items():
        if not get_key(cfg, key):
            raise ConfigError(
                f"{key} is not set: give {flag}, or a --config-file that sets it (`promptmix list` shows the names)"
            )
