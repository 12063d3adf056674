"""Protocols in rounds: each part trains on what the wave before it left, and says in a note what that was.

The note, ``round.json`` in the part's folder, holds the pictures that the part trains on (``DATASET.SUBSET``) and whatever
else went in. It decides what counts: a part that was cut off goes on, and one whose past has changed since is trained again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmix.config.declare import declare_all, key_of, settings_of
from promptmix.errors import ConfigError
from promptmix.runs.protocols import Job, Part, Protocol, make_part_config

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from promptmix.runs.results import RunResult

NOTE = "round.json"


@dataclass(frozen=True)
class Rounds(Protocol):
    """A protocol whose parts follow from each other.

    Attributes:
        plan: dataclass with the protocol's settings, which are the keys of ``PROTOCOL.<NAME>``.
    """

    plan: type[Any] = object

    def add_config(self, node: CfgNode) -> None:
        """Declare the protocol's settings."""
        declare_all(node, self.plan)

    def plan_of(self, job: Job) -> Any:  # what ``plan`` makes
        """Return the settings that a job runs with."""
        node = make_part_config(job, Part("", job.dataset, self.classes)).PROTOCOL[job.protocol.upper()]
        return self.plan(**{name: node[key_of(name)] for name in settings_of(self.plan)})

    def round_part(self, job: Job, name: str, wave: int) -> Part:
        """Return a part of a round, which trains on the pictures that its note names."""
        note = str(Path(job.folder, name, NOTE))
        return Part(name, job.dataset, self.classes, settings=("DATASET.SUBSET", note), trains=True, wave=wave)

    def check(self, job: Job) -> None:
        """Refuse targets, which a protocol in rounds has none of, and settings that no round could be planned with."""
        from promptmix import config

        if job.targets:
            raise ConfigError(f"--targets {' '.join(job.targets)}: {job.protocol} has no targets; leave them out")
        config.check_values(make_part_config(job, Part("", job.dataset, self.classes)))

    def inputs(self, job: Job, part: Part, before: Sequence[RunResult]) -> dict[str, Any]:
        """Return what goes into a part, as plain values; ``train`` and ``test`` number pictures."""
        raise NotImplementedError

    def counts(self, job: Job, part: Part, result: RunResult, before: Sequence[RunResult]) -> bool:
        """Tell whether a result follows from what the wave before has now."""
        note = read_note(job, part)
        return note is not None and note.get("after") == _stamps(before)

    def prepare(self, job: Job, part: Part, cfg: CfgNode, before: Sequence[RunResult]) -> bool:
        """Write the part's note, and remove what was trained from other inputs; return whether what is there still stands."""
        from promptmix.runs.refusals import refuse_other_run
        from promptmix.runs.results import RunResult, plain
        from promptmix.utils import write_json

        folder = Path(job.folder, part.name)
        refuse_other_run(RunResult.from_config(plain(cfg)), folder, eval_only=False)
        now = json.loads(json.dumps(self.inputs(job, part, before)))
        note = read_note(job, part)
        stands = note is not None and {key: value for key, value in note.items() if key != "after"} == now
        if not stands and folder.is_dir():
            shutil.rmtree(folder)
        write_json(now | {"after": _stamps(before)}, folder / NOTE)
        return stands


@contextmanager
def built(job: Job, part: Part, trained: bool = False) -> Iterator[Any]:
    """Give the trainer of a part on all pictures, with what it learned where it was ``trained``; nothing is written.

    Raises:
        ConfigError: the method learns nothing.
    """
    from promptmix.runs.run import running

    cfg = make_part_config(job, replace(part, settings=()))
    last = None if cfg.TEST.FINAL_MODEL == "best_val" else cfg.OPTIM.MAX_EPOCH
    load: dict[str, Any] = {}
    if trained:
        load = {"eval_only": True, "model_dir": str(Path(job.folder, part.name)), "load_epoch": last}
    with running(cfg, no_train=True, quiet=True, **load) as (trainer, result):
        if not result.learned_parameters:
            raise ConfigError(f"TRAINER.NAME is {job.trainer}, which learns nothing; give `{job.protocol}` another")
        yield trainer


def read_note(job: Job, part: Part) -> dict[str, Any] | None:
    """Return what went into a part, or None where nobody has begun it."""
    try:
        found = json.loads(Path(job.folder, part.name, NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _stamps(before: Sequence[RunResult]) -> list[str]:
    return [result.finished for result in before]
