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

    def __init__(self, task: Task, bank: PromptBank, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.gate = nn.Linear(task.clip.embed_dim, bank.num_experts)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the settings: the constructor's arguments in upper case."""
        node.TEMPERATURE = 1.0  # divides the scores

    def forward(self, image_features: Tensor) -> Routing:
        """Route normalised image features (B, D)."""
        scores = self.gate(image_features) / self.temperature
        return Routing.top_k(scores, scores.shape[-1])
'''

_BANK = '''\
class $Class(PromptBank):
    """One learned vector in front of each class name.

    Args:
        task: the frozen model and the data set's words.
        std: standard deviation of the start.
    """

    def __init__(self, task: Task, std: float = 0.02) -> None:
        super().__init__()
        self.task = task
        self.ctx = nn.Parameter(std * torch.randn(1, 1, task.clip.text.width))

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the settings: the constructor's arguments in upper case."""
        node.STD = 0.02  # standard deviation of the start

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

    def __init__(self, task: Task, bank: PromptBank, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("hard", bank.references(task.classnames), persistent=False)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the settings: the constructor's arguments in upper case."""
        node.FACTOR = 1.0  # multiplies the distance

    def forward(self, bank: PromptBank, text_features: Tensor) -> Tensor:
        """Return the loss (scalar) of features (E, C, D)."""
        return self.factor * (text_features - self.hard).square().sum(dim=-1).mean()
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

    def __init__(self, task: Task, bank: PromptBank, factor: float = 0.01) -> None:
        super().__init__()
        self.task, self.factor = task, factor
        self.register_buffer("teacher", task.clip.ensemble(task.templates[:1], task.classnames), persistent=False)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the settings: the constructor's arguments in upper case."""
        node.FACTOR = 0.01  # multiplies the difference

    def forward(self, image_features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss (scalar) for features (B, D) and student scores (B, C)."""
        taught = self.task.clip.scale * image_features @ self.teacher.T
        return self.factor * (logits - taught).square().mean()
'''

_TRAINER = '''\
class $Class(PromptTrainer):
    """One soft prompt, trained with cross-entropy: change what you need."""

    @staticmethod
    def add_config(node: CfgNode) -> None:
        """Declare the method's keys, in ``TRAINER.$CLASS``."""
        node.N_CTX = 4  # context vectors

    def build_learner(self, task: Task) -> PromptLearner:
        """Return what is learned: here a mixture of one prompt without router, supervision or distiller."""
        return Mixture(task, PROMPT_BANK_REGISTRY.get("Soft")(task, n_ctx=self.node.N_CTX))
'''


_NODE = "from yacs.config import CfgNode"
_HOOK = "from promptmix import hookimpl"
_REGISTRY = "from promptmix.registry import Registry"

KINDS = {
    "router": Kind(
        "routers",
        "ROUTER",
        "--trainer MoCoOp ROUTER.NAME $Class",
        ("from torch import Tensor, nn", _NODE, "", _HOOK, _components("PromptBank, Router, Routing, Task"), _REGISTRY),
        _ROUTER,
    ),
    "prompt-bank": Kind(
        "prompt_banks",
        "PROMPT_BANK",
        "--trainer Mixture PROMPT_BANK.NAME $Class",
        (
            "from collections.abc import Sequence",
            "",
            "import torch",
            "import torch.nn.functional as F",
            "from torch import Tensor, nn",
            _NODE,
            "",
            _HOOK,
            _components("PromptBank, Task"),
            _REGISTRY,
        ),
        _BANK,
    ),
    "text-supervision": Kind(
        "text_supervisions",
        "TEXT_SUPERVISION",
        "--trainer Mixture TEXT_SUPERVISION.NAME $Class",
        ("from torch import Tensor", _NODE, "", _HOOK, _components("PromptBank, Task, TextSupervision"), _REGISTRY),
        _SUPERVISION,
    ),
    "distiller": Kind(
        "distillers",
        "DISTILLER",
        "--trainer Mixture DISTILLER.NAME $Class",
        ("from torch import Tensor", _NODE, "", _HOOK, _components("Distiller, PromptBank, Task"), _REGISTRY),
        _DISTILLER,
    ),
    "trainer": Kind(
        "trainers",
        "TRAINER",
        "--trainer $Class",
        (
            _NODE,
            "",
            _HOOK,
            _components("PromptLearner, Task"),
            "from promptmix.prompts.learner import Mixture",
            "from promptmix.prompts.trainer import PromptTrainer",
            "from promptmix.registry import PROMPT_BANK_REGISTRY, Registry",
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
