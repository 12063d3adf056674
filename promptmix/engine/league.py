"""Leagues: what a method sees beside labelled pictures of its training classes. Numbers of two leagues are no ranking."""

from __future__ import annotations

from collections.abc import Iterable

from yacs.config import CfgNode

LABELLED = "labelled pictures"
TEXTS = "LLM texts"
TEACHER = "unlabelled pictures and teacher"
TEST_TIME = "test time"

#: In the order of tables.
LEAGUES = (LABELLED, TEXTS, TEACHER, TEST_TIME)


def league_of(cfg: CfgNode, method: str) -> str:
    """Return the league of a run: the method's, or that of language models' texts where it reads such sentences."""
    return TEXTS if method == LABELLED and cfg.DATASET.get("DESCRIPTIONS") else method


def rank(league: str) -> int:
    """Return where a league stands in tables; unknown ones (of plugins) last."""
    return LEAGUES.index(league) if league in LEAGUES else len(LEAGUES)


def note_on(leagues: Iterable[str]) -> list[str]:
    """Return what must be said of a table in which methods of these leagues stand."""
    found = sorted(set(leagues), key=lambda league: (rank(league), league))
    return [f"leagues differ ({', '.join(found)}): their rows are not a ranking of each other"] if len(found) > 1 else []
