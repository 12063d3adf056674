"""The commands of ``promptmix``: one module each, with ``add_arguments(parser)`` and ``run(args) -> int``.

A new command is a module here and a line in ``COMMANDS``. Modules import torch and the plugins inside ``run`` only, so
that ``--help`` answers at once.
"""

from __future__ import annotations

#: Name of the command (and of its module) to what it does, in the order of the help.
COMMANDS: dict[str, str] = {
    "quickstart": "train and compare methods on the embedded pictures, offline",
    "fit": "train on your own pictures: one command, no config",
    "train": "train and test one method (all flags of CoOp's train.py)",
    "eval": "test a run again, on its own data or on other data, with nothing retyped",
    "run": "a protocol over methods, data sets and seeds: few-shot, base-to-new, cross-dataset, domain-generalization",
    "sweep": "methods x data sets x seeds x protocols from one YAML file, on this machine, Ray or Slurm",
    "data": "list, check and download data sets",
    "predict": "classify any picture with what a run learned",
    "export": "zero-shot weights, or an ONNX graph, of what a run learned, for other programs",
    "parse": "make tables from the results of several runs, ours and CoOp's logs alike",
    "interpret": "what a run learned: nearest words, routing, each expert alone, how far classes moved",
    "report": "one self-contained page about runs: tables, tests, pictures that were told wrong, reliability, what was learned",
    "hub": "pack what a run learned as a folder for others; add, list and check such folders",
    "card": "a model card for what a run learned",
    "convert": "rename a checkpoint between our layout and that of the authors' code",
    "bench": "measure what is saved against the plain way, and compare two measurements",
    "estimate": "expected memory and time of a run, before it runs",
    "cache": "list or clear the features and decoded pictures that are kept on disk",
    "new-plugin": "write a package of your own that adds a router, another part, or a trainer",
    "completion": "print a script by which bash, zsh or tcsh completes commands and flags",
    "list": "show what is registered: trainers, data sets, backbones, plugins, ...",
}
