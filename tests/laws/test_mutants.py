"""The tests are tested: each plausible bug, put into a copy of the package, must make a law fail.

Each takes some ten seconds, so `make test` tries every sixteenth and `make mutants` all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fedloom

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = Path(fedloom.__file__).parent
STORMS = "laws/test_every_schedule.py"
METHODS = "laws/test_every_aggregator.py"
WINDOWS = "laws/test_windows.py"
DEPTHS = "laws/test_every_depth.py"
TREES = "laws/test_every_tree.py"
REGROUPED = "laws/test_regrouped_tree.py"
EDGES = "test_tree.py"

HURRIED = """
import fedloom, hypothesis, pathlib
phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("hurried", phases=phases, database=None)
hypothesis.settings.load_profile("hurried")

def pytest_collection_finish():
    assert pathlib.Path(fedloom.__file__).is_relative_to(pathlib.Path(__file__).parent)
"""
"""A pytest plugin: no shrinking of examples, and proof that the copy is what is tested."""


@dataclass(frozen=True)
class Mutant:
    """A replacement in one file, and the tests that must notice."""

    bug: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "anyone may answer a task",
        "server.py",
        "client not in state.working or state.working[client][1] != number",
        "number not in state.busy",
        STORMS,
    ),
    Mutant(
        "an answered task stays busy",
        "server.py",
        "task = self.state.busy.pop(number)",
        "task = self.state.busy[number]",
        STORMS,
    ),
    Mutant(
        "a rejected answer closes its task",
        "server.py",
        "reason = fault(task, result)\n",
        "reason = fault(task, result)\n                if reason:\n                    self._release(number)\n",
        STORMS,
    ),
    Mutant(
        "a reply is merged again and again",
        "server.py",
        "state.arrived, state.retained = list(merge.retain), len(merge.retain)",
        "pass",
        STORMS,
    ),
    Mutant(
        "a cancelled client stays busy",
        "server.py",
        "Cancel(number, self._release(number).client)",
        "Cancel(number, self.state.busy[number].client)",
        STORMS,
    ),
    Mutant(
        "a task id is used again",
        "server.py",
        "number, state.next_task = state.next_task, state.next_task + 1",
        "number = max(state.busy, default=0) + 1",
        STORMS,
    ),
    Mutant(
        "wake in the past",
        "server.py",
        "max(time, state.now) for time in times",
        "time for time in times",
        STORMS,
    ),
    Mutant(
        "a missed deadline is forgotten",
        "schedule/rounds.py",
        "(fleet.arrived or due > fleet.now)",
        "due > fleet.now",
        STORMS,
    ),
    Mutant(
        "a deadline that fires for ever",
        "schedule/rounds.py",
        "return due if due is not None and (fleet.arrived or due > fleet.now) else None",
        "return due",
        STORMS,
    ),
    Mutant(
        "what an edge threw away is not said",
        "edge.py",
        "return [Discard(one.task.id, one.task.client, reason) for one in server.arrived[server.retained :]]",
        "return []",
        TREES,
    ),
    Mutant(
        "an edge that comes back merges what it said was lost",
        "edge.py",
        "del state.server.arrived[state.server.retained :]",
        "pass",
        EDGES,
    ),
    Mutant(
        "an edge counts members of earlier tasks",
        "edge.py",
        "self.state.shares, self.state.loss, self.state.due = {}, None, None",
        "self.state.loss, self.state.due = None, None",
        TREES,
    ),
    Mutant(
        "edges number their tasks alike",
        "tree.py",
        "state.server.next_task = k * BLOCK + 1",
        "state.server.next_task = 1",
        TREES,
    ),
    Mutant(
        "a report arrives although its task was dropped",
        "tree.py",
        "if entry[2].about != number",
        "if True",
        TREES,
    ),
    Mutant(
        "an edge without members keeps its task",
        "edge.py",
        "if not state.server.stopped and state.empty:",
        "if False:",
        TREES,
    ),
    Mutant(
        "a tree forgets what is on its way",
        "tree.py",
        "times += [self.branches.moving[0][0]] if self.branches.moving else []",
        "",
        TREES,
    ),
    Mutant(
        "moments live on into the next task of the edge",
        "edgemodel.py",
        'basis=f"{outer.id}:{start.basis}"',
        "basis=start.basis",
        TREES,
    ),
    Mutant(
        "members do all steps in every inner round",
        "edge.py",
        "outer.budget.steps // outer.budget.rounds",
        "outer.budget.steps",
        EDGES,
    ),
    Mutant(
        "weights do not sum to 1",
        "schedule/weights.py",
        "weight / total if total > 0",
        "weight if total > 0",
        "schedule/test_rounds.py",
    ),
    Mutant(
        "HLoRA as published forgets the client's scaling",
        "aggregate/hlora.py",
        "return Start(grown, start.basis,",
        "return Start(start.train, start.basis,",
        METHODS,
    ),
    Mutant(
        "raFLoRA does not divide by who holds a direction",
        "aggregate/combine.py",
        "share = merge.step / torch.where(reach > 0, reach, 1.0)",
        "share = merge.step * torch.ones_like(reach)",
        METHODS,
    ),
    Mutant(
        "what nobody holds is lost",
        "aggregate/combine.py",
        "torch.where(reach > 0, 1.0 - merge.step, 1.0)",
        "torch.full_like(reach, 1.0 - merge.step)",
        METHODS,
    ),
    Mutant(
        "what a client started from is added",
        "aggregate/combine.py",
        "yield 1.0, weigh(update.task.start.train.factors[name], -weight * share)",
        "yield 1.0, weigh(update.task.start.train.factors[name], weight * share)",
        METHODS,
    ),
    Mutant(
        "dead directions are handed out",
        "aggregate/combine.py",
        "revive(cut(sorted_, budget.rank), budget.rank, derive(seed, name))",
        "cut(sorted_, budget.rank)",
        METHODS,
    ),
    Mutant(
        "FedIT's directions die with a round of low ranks",
        "aggregate/combine.py",
        "revive(factor, rank, derive(model.basis, name))",
        "factor",
        METHODS,
    ),
    Mutant(
        "what a client cannot train is not in its base",
        "aggregate/combine.py",
        "for i in range(rank) if i not in without",
        "for i in range(rank) if i in without",
        METHODS,
    ),
    Mutant(
        "FedEx adds the mean of factors instead of taking it off",
        "aggregate/fedex.py",
        "(1.0, scale(factor, -1.0))",
        "(1.0, scale(factor, 1.0))",
        METHODS,
    ),
    Mutant(
        "a merge forgets what was folded before",
        "aggregate/combine.py",
        "before = [(1.0, model.fold.factors[name])] if model.fold and name in model.fold.factors else []",
        "before = []",
        METHODS,
    ),
    Mutant(
        "modules are averaged over everybody",
        "aggregate/fedplora.py",
        "moved(model.adapter, merge, slot_weights)",
        "moved(model.adapter, merge, lambda name, merge, rank: torch.ones(rank, dtype=torch.float64))",
        METHODS,
    ),
    Mutant(
        "a frozen side may be changed",
        "check.py",
        "if not sent.equal(back):",
        "if sent.shape != back.shape:",
        "test_check.py",
    ),
    Mutant(
        "an edge contributes layers that no member trained",
        "edge.py",
        "if name in state.trained}",
        "}",
        "test_tree.py",
    ),
    Mutant(
        "what a region tells is learnt unseen",
        "regions.py",
        "if reason := untellable(asked, event.told, self.shape):",
        "if reason := None:",
        "test_regions.py",
    ),
    Mutant(
        "a region is planned for whatever its members are",
        "regions.py",
        "        return str(error)",
        "        return None",
        "test_regions.py",
    ),
    Mutant(
        "a region's report counts for layers that nobody trained",
        "regions.py",
        "        self.state.busy[event.task] = task\n",
        "",
        "test_regions.py",
    ),
    Mutant(
        "what inner rounds wait is not learnt",
        "plan/grouped.py",
        "barrier=followed([max(barrier(told), surprise(told, known)) for told in log.told]),",
        "",
        "plan/test_grouped.py",
    ),
    Mutant(
        "a pruned client is asked for its old rank",
        "server.py",
        "budget = replace(budget, rank=min(budget.rank, state.pruned.get(client, budget.rank)))",
        "pass",
        "test_server.py",
    ),
    Mutant(
        "what did not change is paid for",
        "payload.py",
        "(before != after).any(along).tolist().count(True)",
        "after.shape[1 - along]",
        "test_payload.py",
    ),
    Mutant(
        "the decomposition is not sorted",
        "lora.py",
        "return Factor(right, left * values), energy",
        "return Factor(right.flip(0), (left * values).flip(1)), energy",
        METHODS,
    ),
    Mutant(
        "NaN is a number",
        "check.py",
        "if not math.isfinite(size):",
        "if size == math.inf:",
        "test_check.py",
    ),
    Mutant(
        "a client is drawn twice",
        "schedule/draw.py",
        "moved[place] = moved.get(k, k)",
        "pass",
        "schedule/test_draw.py",
    ),
    Mutant(
        "whoever stood last is lost",
        "indexed.py",
        "self._keys[place], self._values[place], self._places[last] = last, moved, place",
        "self._keys[place], self._values[place] = last, moved",
        "test_indexed.py",
    ),
    Mutant(
        "the anchor is added beside changes",
        "aggregate/combine.py",
        "return replace(merge, as_delta=True, anchor=None)",
        "return replace(merge, as_delta=True)",
        WINDOWS,
    ),
    Mutant(
        "what the server has is in the window twice",
        "aggregate/combine.py",
        "shares = [(-1.0, model), (1.0 - merge.step, merge.anchor or model)]",
        "shares = [(1.0 - merge.step, merge.anchor or model)]",
        WINDOWS,
    ),
    Mutant(
        "everybody started from the model of today",
        "aggregate/combine.py",
        "(merge.step * weight, update.base or model)",
        "(merge.step * weight, model)",
        WINDOWS,
    ),
    Mutant(
        "folds are forgotten in a window",
        "aggregate/combine.py",
        """        if one.fold and name in one.fold.factors:
            yield share, one.fold.factors[name]""",
        "",
        WINDOWS,
    ),
    Mutant(
        "LoRA-A2 adds a change once for every version that it is in",
        "aggregate/lora_a2.py",
        "adapter = added(moved(model.adapter, changes(merge), everyone), apart(model, merge))",
        "adapter = moved(model.adapter, changes(merge), everyone)",
        WINDOWS,
    ),
    Mutant(
        "an average is in the sum of versions",
        "aggregate/averaged.py",
        "return replace(update, base=update.base and last(update.base))",
        "return update",
        WINDOWS,
    ),
    Mutant(
        "FedFa keeps one answer too many",
        "schedule/fedfa.py",
        "_latest(fleet, self.dedup)[-self.window :]",
        "_latest(fleet, self.dedup)[-self.window - 1 :]",
        "schedule/test_fedfa.py",
    ),
    Mutant(
        "FedFa begins with the model of today",
        "schedule/fedfa.py",
        "anchor=None if self.delta_rate or filled == 1.0 else fleet.first",
        "anchor=None",
        "schedule/test_fedfa.py",
    ),
    Mutant(
        "a version of nothing new",
        "schedule/fedfa.py",
        "len(fleet.arrived) > fleet.retained, len",
        "len(fleet.arrived) > 0, len",
        "schedule/test_fedfa.py",
    ),
    Mutant(
        "FedBuff's stale answers count less beside fresh ones alone",
        "schedule/fedbuff.py",
        "step=self._rate(fleet) * counted",
        "step=self._rate(fleet)",
        "schedule/test_fedbuff.py",
    ),
    Mutant(
        "who waits for a version works on",
        "schedule/fedbuff.py",
        "for client in drawn if client not in waiting]",
        "for client in drawn]",
        "schedule/test_fedbuff.py",
    ),
    Mutant(
        "FedAsync forgets the staleness",
        "schedule/fedasync.py",
        "step = self.mixing * self.discount(staleness(fleet, update))",
        "step = self.mixing",
        "schedule/test_fedasync.py",
    ),
    Mutant(
        "FedAsync throws away who came second",
        "schedule/fedasync.py",
        "step, retain=tuple(others), cancel",
        "step, cancel",
        "schedule/test_fedasync.py",
    ),
    Mutant(
        "whoever worked most goes on",
        "schedule/draw.py",
        "return sorted(drawn, key=seconds)",
        "return sorted(drawn, key=seconds, reverse=True)",
        "schedule/test_draw.py",
    ),
    Mutant(
        "the seconds of earlier tasks are forgotten",
        "server.py",
        "self.state.worked.get(task.client, 0.0) + self.state.now - task.sent",
        "self.state.now - task.sent",
        "test_server.py",
    ),
    Mutant(
        "work is aborted a version late",
        "schedule/staleness.py",
        "if fleet.version + 1 - task.version > limit",
        "if fleet.version - task.version > limit",
        "schedule/test_staleness.py",
    ),
    Mutant(
        "an aborted place stays taken",
        "server.py",
        "commands: list[Command] = [self._cancel(number) for number in merge.cancel]",
        "commands: list[Command] = [Cancel(number, self.state.busy[number].client) for number in merge.cancel]",
        STORMS,
    ),
    Mutant(
        "seeds by hash()",
        "seeds.py",
        'int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1',
        "hash(text) % 2**63",
        "test_seeds.py",
    ),
    Mutant(
        "a layer is divided by everybody",
        "layers.py",
        "parts = tuple((w / total if total > 0 else 1 / len(chosen), self.update(update)) for w, update in chosen)",
        "parts = tuple((w, self.update(update)) for w, update in chosen)",
        DEPTHS,
    ),
    Mutant(
        "a layer that nobody trained is averaged with nothing",
        "layers.py",
        "if held else replace(piece, discarded=0.0)",
        "if held else replace(piece, adapter=_without(piece.adapter, ()), memory={})",
        DEPTHS,
    ),
    Mutant(
        "a version cut twice is two versions",
        "layers.py",
        "        if whole not in self.adapters:\n",
        "        if True:\n",
        DEPTHS,
    ),
    Mutant(
        "layers of different memories are one",
        "layers.py",
        "found.setdefault((held, known), (held, []))",
        "found.setdefault(held, (held, []))",
        DEPTHS,
    ),
    Mutant(
        "the head goes with the lowest layers",
        "layers.py",
        "dense=order[-1] in names)",
        "dense=order[0] in names)",
        DEPTHS,
    ),
    Mutant(
        "what is not trained does not run",
        "layers.py",
        "fold=Adapter(fold) if any(factor.rank for factor in below.values()) else start.fold,",
        "fold=start.fold,",
        DEPTHS,
    ),
    Mutant(
        "the fold of a layer is forgotten below",
        "layers.py",
        "fold[name] = stack([(1.0, fold[name]), (1.0, factor)]) if name in fold else factor",
        "fold[name] = factor",
        DEPTHS,
    ),
    Mutant(
        "a step without learnt slope",
        "plan/costmodel.py",
        "covariance=(1 - gain) * (self.covariance + gain * deeper * longer),",
        "covariance=self.covariance,",
        "plan/test_costmodel.py",
    ),
    Mutant(
        "depth is counted from the input",
        "cost.py",
        "for name in names if self.depths[name] > depth)",
        "for name in names if self.layers + 1 - self.depths[name] > depth)",
        "test_cost.py",
    ),
    Mutant(
        "what is not sent back is paid for",
        "cost.py",
        "        return 4 * (self.adapter_parameters(rank, depth) + self.dense)",
        "        return 4 * (self.adapter_parameters(rank) + self.dense)",
        "test_cost.py",
    ),
    Mutant(
        "a client moves while its edge is at work",
        "regroup.py",
        "if branches.edges[branches.edge_of[client]].server.outer is None",
        "if True",
        REGROUPED,
    ),
    Mutant(
        "an edge loses its last member",
        "regroup.py",
        "for one in who if not after[one.edge]",
        "for one in who if False",
        REGROUPED,
    ),
    Mutant(
        "a client that moved is still counted on where it was",
        "tree.py",
        "self._edge(move.edge).handle(now, ClientLost(move.client))",
        "pass",
        REGROUPED,
    ),
    Mutant(
        "a client that moved is not taken in",
        "tree.py",
        "self._edge(move.to).handle(now, ClientJoined(here))",
        "pass",
        REGROUPED,
    ),
    Mutant(
        "the root knows an edge by the members that it had",
        "tree.py",
        "if known != root.groups[edge].edge and",
        "if known is None and",
        REGROUPED,
    ),
    Mutant(
        "the tasks of a client that moved begin anew",
        "regroup.py",
        'for table in ("seen", "dispatched", "worked", "pruned"):',
        'for table in ("seen", "worked", "pruned"):',
        "test_regroup.py",
    ),
    Mutant(
        "what a member did is forgotten when it moves",
        "regroup.py",
        "_remembering(after, move.client, history(before, move.client))",
        "after",
        "test_regroup.py",
    ),
]


def copied(to: Path) -> Path:
    """A copy of the package, beside the plugin."""
    shutil.copytree(PACKAGE, to / "fedloom", ignore=shutil.ignore_patterns("__pycache__"))
    (to / "hurried.py").write_text(HURRIED, encoding="utf-8")
    return to


def outcome(src: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest on these tests with the package in `src`."""
    paths = [str(TESTS / test) for test in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "hurried", "-o", f"pythonpath={src} {TESTS}"]
    where = ["--rootdir", str(TESTS.parent), "-c", str(TESTS.parent / "pyproject.toml")]
    environment = os.environ | {"PYTHONPATH": str(src), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *options, *where, *paths]
    return subprocess.run(command, cwd=src, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_mutant_changes_one_place(mutant: Mutant) -> None:
    assert (PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1


@pytest.mark.slow
@pytest.mark.mutants
def test_the_copy_as_it_is_passes(tmp_path: Path) -> None:
    ran = outcome(copied(tmp_path), *sorted({mutant.tests for mutant in MUTANTS}))
    assert ran.returncode == 0, ran.stdout


TRIED = [pytest.param(one, marks=[pytest.mark.mutants] * (k % 16 > 0), id=one.bug) for k, one in enumerate(MUTANTS)]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", TRIED)
def test_a_mutant_does_not_survive(mutant: Mutant, tmp_path: Path) -> None:
    file = copied(tmp_path) / "fedloom" / mutant.file
    source = file.read_text(encoding="utf-8")
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    ran = outcome(tmp_path, mutant.tests)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "FAILED" in ran.stdout
    assert "ERROR" not in ran.stdout
