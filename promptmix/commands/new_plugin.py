"""``promptmix new-plugin``: write a package of your own that adds one part, ready to install."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

from promptmix.errors import UserError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Kind:
    """What one kind of part needs.

    Attributes:
        registry: the plural that ``promptmix list`` and the hook ``register_<plural>`` use.
        node: config node that holds its settings.
        use: command-line words that put the part to use.
        imports: import lines.
        body: its class; ``$Class`` stands for the name.
    """

    registry: str
    node: str
    use: str
    imports: tuple[str, ...]
    body: str


def _components(names: str) -> str:
    return f"from promptmix.prompts.roles import {names}"


SETUP = '''\
"""Installs the plugin; the entry point is how promptmix finds it."""

from setuptools import setup

setup(
    name="$name",
    version="0.1.0",
    description="$summary",
    py_modules=["$module"],
    python_requires=">=3.10",
    install_requires=["promptmix"],
    entry_points={"promptmix": ["$entry = $module"]},
)
'''

README = """\
# $name

$summary

```
pip install .
promptmix list $registry
promptmix train --config-file configs/quickstart.yaml --seed 1 --output-dir runs/$entry $use
```

Without installing: `promptmix train --plugin ./$module.py ...`. The settings are declared in `add_config`; `pytest` checks that
promptmix finds them.
"""

MODULE = '''\
"""$summary"""

from __future__ import annotations

$imports


$body

@hookimpl
def register_$registry(registry: Registry) -> None:
    """Add the part; promptmix calls this when it loads the plugin."""
    registry.register($Class)
'''

TEST = '''\
"""The part is there, and its settings are in the config tree."""

from promptmix.config import get_cfg
from promptmix.plugin_manager import get_plugin_manager, load_plugin
from promptmix.registry import REGISTRIES


def test_registered():
    get_plugin_manager()
    load_plugin("$module")
    assert REGISTRIES["$registry"].get("$Class").__module__ == "$module"
    assert "$CLASS" in get_cfg()["$node"]
'''

FILES = {"setup.py": SETUP, "README.md": README, "$module.py": MODULE, "tests/test_$entry.py": TEST}

_ROUTER = '''\
class $Class(Router):
    """A linear map to one score per expert; every image goes to all of them.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts.
        temperature: divides the scores; small values make the choice sharper.
    """

    def __init__(
        self, task: Task, bank: PromptBank, temperature: Annotated[float, Setting("divides the scores", above=0)] = 1.0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.gate = nn.Linear(task.clip.embed_dim, bank.num_experts)

    def forward(self, step: Step) -> Routing:
        """Route a batch by its image features."""
        scores = self.gate(step.query) / self.temperature
        return Routing.top_k(scores, scores.shape[-1])
'''

_BANK = '''\
class $Class(PromptBank):
    """One learned vector in front of each class name.

    Args:
        task: the frozen model and the data set's words.
        std: standard deviation of the start.
    """

    def __init__(self, task: Task, std: Annotated[float, Setting("standard deviation of the start", above=0)] = 0.02) -> None:
        super().__init__()
        self.task = task
        self.ctx = nn.Parameter(std * torch.randn(1, 1, task.clip.text.width))

    @property
    def num_experts(self) -> int:
        """Number of prompts E."""
        return 1

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (E, C, D)."""
        tower = self.task.clip.text
        return F.normalize(tower(tower.compose(self.ctx, tower.tokenizer.class_tokens(names))), dim=-1)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return normalised hard-prompt features (E, C, D)."""
        return self.task.clip.hard_features(self.task.templates[:1], names)
'''

_SUPERVISION = '''\
class $Class(TextSupervision):
    """Mean squared distance between soft features and each expert's hard ones.

    Args:
        task: the frozen model and the data set's words.
        bank: the experts.
        factor: multiplies the distance.
    """

    hard: Tensor

    def __init__(
        self, task: Task, bank: PromptBank, factor: Annotated[float, Setting("multiplies the distance", low=0)] = 1.0
    ) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("hard", bank.references(task.classnames), persistent=False)

    def forward(self, step: Step) -> Tensor:
        """Return the loss (scalar) of text features (E, C, D)."""
        return self.factor * (step.text - self.hard).square().sum(dim=-1).mean()
'''

_DISTILLER = '''\
class $Class(Distiller):
    """Mean squared difference between the student's scores and those of the data set's first template.

    Args:
        task: the frozen model and the data set's words.
        bank: the student's prompts.
        factor: multiplies the difference.
    """

    teacher: Tensor

    def __init__(
        self, task: Task, bank: PromptBank, factor: Annotated[float, Setting("multiplies the difference", low=0)] = 0.01
    ) -> None:
        super().__init__()
        self.task, self.factor = task, factor
        self.register_buffer("teacher", task.clip.ensemble(task.templates[:1], task.classnames), persistent=False)

    def forward(self, step: Step) -> Tensor:
        """Return the loss (scalar) of the student's scores (B, C)."""
        taught = self.task.clip.scale * step.frozen_image @ self.teacher.T
        return self.factor * (step.logits - taught).square().mean()
'''

_TRAINER = '''\
class $Class(PromptTrainer):
    """One soft prompt, trained with cross-entropy: change what you need."""

    def compose(self, task: Task, n_ctx: Annotated[int, Setting("context vectors", low=1)] = 4) -> Learner:
        """Return what is learned; the settings are the keys of ``TRAINER.$CLASS``."""
        return Learner(task, Soft(task, n_ctx))
'''


_ANNOTATED = "from typing import Annotated"
_HOOK = "from promptmix import hookimpl"
_SETTING = "from promptmix.config.declare import Setting"
_STEP = "from promptmix.prompts.step import Step"
_REGISTRY = "from promptmix.registry import Registry"


def _of_step(torch: str, roles: str) -> tuple[str, ...]:
    """Return the imports of a part that reads a step."""
    return (_ANNOTATED, "", torch, "", _HOOK, _SETTING, _components(roles), _STEP, _REGISTRY)


KINDS = {
    "router": Kind(
        "routers",
        "ROUTER",
        "--trainer MoCoOp ROUTER.NAME $Class",
        (
            _ANNOTATED,
            "",
            "from torch import nn",
            "",
            _HOOK,
            _SETTING,
            _components("PromptBank, Router, Routing, Task"),
            _STEP,
            _REGISTRY,
        ),
        _ROUTER,
    ),
    "prompt-bank": Kind(
        "prompt_banks",
        "PROMPT_BANK",
        "--trainer Mixture PROMPT_BANK.NAME $Class",
        (
            "from collections.abc import Sequence",
            _ANNOTATED,
            "",
            "import torch",
            "import torch.nn.functional as F",
            "from torch import Tensor, nn",
            "",
            _HOOK,
            _SETTING,
            _components("PromptBank, Task"),
            _REGISTRY,
        ),
        _BANK,
    ),
    "text-supervision": Kind(
        "text_supervisions",
        "TEXT_SUPERVISION",
        "--trainer Mixture TEXT_SUPERVISION.NAME $Class",
        (
            _ANNOTATED,
            "",
            "from torch import Tensor",
            "",
            _HOOK,
            _SETTING,
            _components("PromptBank, Task, TextSupervision"),
            _STEP,
            _REGISTRY,
        ),
        _SUPERVISION,
    ),
    "distiller": Kind(
        "distillers",
        "DISTILLER",
        "--trainer Mixture DISTILLER.NAME $Class",
        (
            _ANNOTATED,
            "",
            "from torch import Tensor",
            "",
            _HOOK,
            _SETTING,
            _components("Distiller, PromptBank, Task"),
            _STEP,
            _REGISTRY,
        ),
        _DISTILLER,
    ),
    "trainer": Kind(
        "trainers",
        "TRAINER",
        "--trainer $Class",
        (
            _ANNOTATED,
            "",
            _HOOK,
            _SETTING,
            "from promptmix.plugins.prompt_bank.soft import Soft",
            "from promptmix.prompts.learner import Learner",
            _components("Task"),
            "from promptmix.prompts.trainer import PromptTrainer",
            _REGISTRY,
        ),
        _TRAINER,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="name of the package and of its folder, such as promptmix-cosine-router")
    parser.add_argument("--kind", choices=tuple(KINDS), default="router", help="what it adds (default: router)")
    parser.add_argument("--summary", default="", help="one line on what it does, for its README and docstring")
    parser.add_argument("--directory", default=".", metavar="DIR", help="where to put the folder (default: here)")


def run(args: argparse.Namespace) -> int:
    """Write the package and say how to go on."""
    folder = Path(args.directory, args.name)
    files = package(args.name, args.kind, args.summary)
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another NAME or --directory")
    _refuse_taken(args.name, KINDS[args.kind].registry)
    for path, text in files.items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{target}: {error.strerror or error}; choose another --directory") from error
    sys.stdout.write(f"{folder}: {', '.join(files)}\nNext: pip install {folder}, then follow {folder / 'README.md'}\n")
    return 0


def package(name: str, kind: str, summary: str = "") -> dict[str, str]:
    """Return a package's files, relative path to text.

    Args:
        name: name of the package; its class is the name in camel case without a leading ``promptmix-``.
        kind: a key of ``KINDS``.
        summary: one line on what it does.

    Raises:
        UserError: the name is not words of small letters and digits joined by hyphens, or the summary would break a docstring.
    """
    short = name.removeprefix("promptmix-")
    if not _NAME.fullmatch(name) or not _NAME.fullmatch(short) or name == "promptmix":
        raise UserError(
            f"NAME {name!r} must be words of small letters and digits joined by hyphens, such as promptmix-cosine-router"
        )
    if any(character in summary for character in '"\\\n$'):
        raise UserError("--summary must be one line without quotes, backslashes and dollar signs; write those in the README")
    part, plain = KINDS[kind], kind.replace("-", " ")
    words = {
        "name": name,
        "module": name.replace("-", "_"),
        "entry": short.replace("-", "_"),
        "Class": _class(name),
        "CLASS": _class(name).upper(),
        "registry": part.registry,
        "node": part.node,
        "summary": summary or f"A {plain} for promptmix.",
    }
    words["imports"] = "\n".join(part.imports)
    words |= {key: Template(value).substitute(words) for key, value in {"use": part.use, "body": part.body}.items()}
    return {Template(path).substitute(words): Template(text).substitute(words) for path, text in FILES.items()}


def _class(name: str) -> str:
    return "".join(word.capitalize() for word in name.removeprefix("promptmix-").split("-"))


def _refuse_taken(name: str, registry: str) -> None:
    """Refuse what could not be loaded later: two modules, or two parts, of one name."""
    from promptmix.plugin_manager import get_plugin_manager
    from promptmix.registry import REGISTRIES

    get_plugin_manager()
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is not None:
        raise UserError(f"NAME {name}: a module {module} is installed already; choose another NAME")
    if _class(name) in REGISTRIES[registry]:
        raise UserError(
            f"NAME {name}: {_class(name)} is taken by {REGISTRIES[registry].origin(_class(name))}; choose another NAME"
        )
