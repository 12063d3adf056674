"""The suite for compiled steps: operators of graphs, and wrong numbers fail. ``test_compiled.py`` captures the steps."""

from __future__ import annotations

import torch

from promptmix.bench import graphs
from promptmix.bench.graphs import Graphs
from promptmix.cli import main


def test_graphs_are_counted_each_way():
    forward, backward = [], []
    torch._dynamo.reset()
    work = torch.compile(lambda x: (x.split(2)[0].exp() * x[2:]).sum(), backend=graphs._keeper(forward, backward), fullgraph=True)
    x = torch.arange(4.0, requires_grad=True)
    work(x).backward()
    assert len(forward) == len(backward) == 1 and forward[0] >= 4 and backward[0] >= 4  # split, exp, mul, sum; the rest are views
    exp = x.detach()[:2].exp()
    torch.testing.assert_close(x.grad, torch.cat([exp * x.detach()[2:], exp]))


def test_wrong_numbers_fail(monkeypatch, capsys):
    found = [
        Graphs("CoOp", (5,), (7,), 0, 1e-6),
        Graphs("CoCoOp", (5,), (7, 8), 1, 1e-6, 2e-2, 61.4),
        Graphs("MaPLe", error="why"),
    ]
    monkeypatch.setattr(graphs, "run", lambda world, args: found)
    assert [graphs.is_wrong(one) for one in found] == [False, True, True]
    assert graphs.is_wrong(Graphs("CoOp", (5,), (7,), 0, float("inf")))
    assert main(["bench", "graphs", "--backbone", "tiny-vit", "--device", "cpu"]) == 1
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert shown[:2] == [
        ["CoOp", "1: 5", "1: 7", "0", "1e-06", "-", "-", ""],
        ["CoCoOp", "1: 5", "2: 7, 8", "1", "1e-06", "2e-02", "61", ""],
    ]
    assert shown[2] == ["MaPLe", *["-"] * 6, "why"]
