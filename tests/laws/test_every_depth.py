"""Clients of mixed depth: each layer is merged of those who trained it, by the method's own rule; the others keep their value.

What each method makes of the layers that the same clients hold is its oracle (`oracles.py`), in dense float64. Methods that need
every client to train every layer are refused, and by a run's `prepare`; they are named here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedloom.aggregate.averaged import Averaged, last_version
from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.flora import FLoRA
from fedloom.core.errors import Refused
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, Factor
from fedloom.core.partial_depth import fold_layers, merge_by_layer, require_all_layers
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.policies import aggregator_layers as wrapped
from fedloom.core.types import Budget, Model, Task, TaskStart, Update
from tests.support import toys
from tests.support.equations import Round, Values, round_of
from tests.support.oracle_cases import BAR, FORMS, MORE, Answer, answered, errors
from tests.support.oracles import oracle_of
from tests.support.storms import tries

LAYERS = {"low": (12, 10), "middle": (9, 11), "top": (10, 14)}
NAMES, TOP = [*LAYERS], 8
WHOLE = ("CA2FL", "ACE", "FedSA")
"""Methods that are refused where depths differ."""


def shares_all_it_trains(method: Aggregator) -> bool:
    return not {type(layer).__name__ for layer in wrapped(method)} & {*WHOLE}


EVERY = toys.aggregators() + MORE
METHODS = [m for m in EVERY if shares_all_it_trains(m)] + [Averaged(FLoRA()), Averaged(FedEx(), 0.0)]
every_method = pytest.mark.parametrize("method", METHODS, ids=toys.called)


@dataclass(frozen=True)
class Deep:
    """An answer, and how many layers from the output its client trained."""

    depth: int
    answer: Answer


ANSWERS = st.lists(
    st.builds(Deep, st.integers(1, 3), st.builds(Answer, *[st.integers(1, n) for n in (TOP, 9)], st.booleans(), st.booleans())),
    min_size=1, max_size=4,
)  # fmt: skip
MERGES = st.lists(st.tuples(ANSWERS, FORMS), min_size=1, max_size=3)
EVERYTHING = [
    ([Deep(1, Answer(8, 3, False, False)), Deep(1, Answer(4, 3, False, False))], (1.0, False)),
    ([Deep(2, Answer(8, 3, False, True)), Deep(1, Answer(3, 2, True, False)), Deep(2, Answer(8, 1, False, False))], (0.3, False)),
    ([Deep(3, Answer(8, 1, True, False)), Deep(1, Answer(2, 5, False, True)), Deep(2, Answer(5, 4, False, False))], (1.0, True)),
    ([Deep(3, Answer(8, 1, False, False)), Deep(3, Answer(8, 2, True, False))], (1.0, False)),
    ([Deep(3, Answer(6, 1, False, False)), Deep(2, Answer(8, 2, True, False))], (0.3, True)),
]  # fmt: skip
"""Nobody trains the lowest, then everybody; late answers; what a wrapper remembers of some layers only; full depth in between."""


def begin(method: Aggregator) -> Model:
    """Graded spectra, whose cuts float32 can know."""
    factors = {}
    for k, (name, size) in enumerate(LAYERS.items()):
        f = toys.factor(TOP, *size, seed=k)
        down, up = torch.linalg.qr(f.down.T)[0].T, torch.linalg.qr(f.up)[0]
        factors[name] = Factor(down, up * torch.tensor([(1.0 + k) * 0.5**i for i in range(TOP)]).sqrt())
    return method.init(Adapter(factors, {"head": torch.tensor([1.0, -2.0, 0.5])}))


def below(depth: int) -> list[str]:
    return NAMES[: len(NAMES) - depth]


def task(method: Aggregator, model: Model, rank: int, depth: int, number: int = 1) -> Task:
    """What the server would send."""
    start = fold_layers(method.start(model, Budget(rank, 5), seed=number), below(depth))
    return Task(number, f"c{number}", 0, start, Budget(rank, 5, depth), 0.0)


def merge_of(method: Aggregator, models: Sequence[Model], answers: Sequence[Deep], form: tuple[float, bool]) -> Merge:
    total, parts = sum(one.answer.weight for one in answers), []
    for k, one in enumerate(answers):
        model = models[-2 if one.answer.late and len(models) > 1 else -1]
        own = task(method, model, one.answer.rank, one.depth, 100 * len(models) + k)
        parts.append((one.answer.weight / total, answered(replace(own, client=f"c{k}"), one.answer.prune)))
    return Merge(tuple(parts), *form)


def of(layers: Collection[str], dense: bool, memory: Values) -> Values:
    """Memory entries of these layers, and those of no layer."""
    return {key: x for key, x in memory.items() if (key.split(".")[0] in layers if "." in key else dense)}


def part(r: Round, layers: Sequence[str]) -> Round:
    """The round of these layers and of the clients who hold them, by their weights among themselves."""
    dense = NAMES[-1] in layers
    held = [c for c in r.clients if f"{layers[0]}.A" in c.gave]
    total, memory = sum(c.p for c in held), {}
    for key, entry in r.memory.items():
        by_layer = any("." in name for name in entry)
        if not by_layer or any(name.split(".")[0] in layers for name in entry if "." in name):
            memory[key] = of(layers, dense, entry) if by_layer else entry
    clients = [
        replace(c, p=c.p / total, **{name: of(layers, dense, getattr(c, name)) for name in ("gave", "got", "control")})
        for c in held
    ]
    fold = {name: x for name, x in r.fold.items() if name in layers}
    return replace(r, own=of(layers, dense, r.own), fold=fold, memory=memory, clients=clients)


def divided(r: Round) -> list[list[str]]:
    """Layers of the same clients, of which the same is remembered."""
    found: dict[Any, list[str]] = {}
    for layer in r.layers:
        clients = tuple(f"{layer}.A" in c.gave for c in r.clients)
        remembered = tuple(f"{layer}.A" in entry for entry in r.memory.values())
        found.setdefault((clients, remembered), []).append(layer)
    return [*found.values()]


@every_method
@given(merges=MERGES)
@example(merges=EVERYTHING)
@tries(10)
def test_each_layer_is_what_the_method_makes_of_those_who_trained_it(
    method: Aggregator, merges: list[tuple[list[Deep], Any]]
) -> None:
    """HierFedLoRA (methods 4b.2, step 6): theta_l = mean over G_l; layers that nobody trained keep their value."""
    models = [begin(method)]
    for answers, form in merges:
        merge = merge_of(method, models, answers, form)
        models.append(merge_by_layer(method, models[-1], merge))
        before, after = models[-2:]
        r = round_of(before, merge)
        for layers in divided(r):
            own = part(r, layers)
            if own.clients:
                found = errors(after, own, oracle_of(method)(method, own))
                assert max(found.values()) < BAR, (layers, found)
            else:
                assert untouched(before, after, layers)
        assert [*after.adapter.factors] == NAMES
        assert last_version(after).adapter.factors.keys() == LAYERS.keys()


def untouched(before: Model, after: Model, layers: Sequence[str]) -> bool:
    """To the bit, fold and memory included."""

    def only(of: Adapter | None) -> Adapter:
        return Adapter({n: f for n, f in of.factors.items() if n in layers} if of else {})

    pairs = [(before.adapter, after.adapter), (before.fold, after.fold)]
    pairs += [(entry, after.memory.get(key)) for key, entry in before.memory.items()]
    return all(fingerprint(only(one)) == fingerprint(only(other)) for one, other in pairs)


@every_method
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_client_runs_the_whole_model_and_trains_its_depth(method: Aggregator, depth: int) -> None:
    """Laws 3 and 8: what is not trained is in the fold once, the function is that of full depth, to rounding."""
    models = [begin(method)]
    models.append(
        merge_by_layer(method, models[0], merge_of(method, models, [Deep(3, Answer(8, 1, False, False))], (1.0, False)))
    )
    for model in models:
        whole = method.start(model, Budget(4, 5), seed=7)
        start = fold_layers(whole, below(depth))
        assert [*start.train.factors] == NAMES[3 - depth :]
        assert start.train.dense is whole.train.dense
        for name in LAYERS:
            ours, theirs = (function(one, name) for one in (start, whole))
            assert float((ours - theirs).norm()) <= 1e-6 * max(1.0, float(theirs.norm()))


def function(start: TaskStart, name: str) -> torch.Tensor:
    """What is added to the base of this layer."""
    parts = [adapter.factors[name] for adapter in (start.train, start.fold) if adapter and name in adapter.factors]
    return sum((toys.product(f) for f in parts), start=torch.zeros(LAYERS[name], dtype=torch.float64))


@every_method
def test_who_is_shallow_has_no_say_below(method: Aggregator) -> None:
    """Law 8: the lower layers are as if the deep client had answered alone, and as before where it did not answer."""
    model = begin(method)
    deep, shallow = (answered(task(method, model, 8, depth, number), False) for depth, number in ((3, 1), (1, 2)))
    none = merge_by_layer(method, model, Merge(((1.0, shallow),)))
    before, after = (method.start(one, Budget(4, 5), seed=7) for one in (model, none))
    for name in below(1):
        assert torch.equal(function(before, name), function(after, name))
    both = merge_by_layer(method, model, Merge(((0.25, deep), (0.75, shallow))))
    below_only = replace(deep.result, adapter=without(deep.result.adapter), control=without(deep.result.control))
    start = replace(deep.task.start, train=without(deep.task.start.train), control=without(deep.task.start.control))
    memory = {key: without(entry) if entry.factors else entry for key, entry in model.memory.items()}
    cut = replace(model, adapter=without(model.adapter), fold=without(model.fold), memory=memory)
    alone = method.merge(cut, Merge(((1.0, Update(replace(deep.task, start=start), below_only)),)))
    for name in below(1):
        for one, other in ((both, alone), (last_version(both), last_version(alone))):
            assert torch.equal(one.adapter.factors[name].down, other.adapter.factors[name].down)
            assert torch.equal(one.adapter.factors[name].up, other.adapter.factors[name].up)


def without(of: Any) -> Any:
    """The layers below the top one, no head."""
    return of and Adapter({n: f for n, f in of.factors.items() if n in below(1)})


@every_method
def test_full_depth_is_the_methods_own_merge(method: Aggregator) -> None:
    """To the bit, as often as everybody trains everything."""
    ours = theirs = begin(method)
    for turn in range(3):
        answers = [Deep(3, Answer(rank, 1, False, False)) for rank in (8, 2, 5)]
        merge = merge_of(method, [ours] * (turn + 1), answers, (1.0, False))
        ours, theirs = merge_by_layer(method, ours, merge), method.merge(theirs, merge)
        assert fingerprint(ours.adapter) == fingerprint(theirs.adapter)
        assert ours.memory.keys() == theirs.memory.keys()


@every_method
def test_whose_model_a_client_changed_is_known_layer_by_layer(method: Aggregator) -> None:
    """`base_offsets` knows a version again by being the same object: an answer to the model of today moves by its change alone."""
    models = [begin(method)]
    for depths in ((3, 2), (1, 3), (2, 1)):
        merge = merge_of(method, models, [Deep(d, Answer(8, 1, False, False)) for d in depths], (1.0, False))
        explicit = replace(
            merge, weighted_updates=tuple((w, replace(u, base=models[-1])) for w, u in merge.weighted_updates)
        )
        one, other = (merge_by_layer(method, models[-1], m) for m in (merge, explicit))
        assert fingerprint(one.adapter) == fingerprint(other.adapter)
        models.append(one)


@pytest.mark.parametrize("method", EVERY, ids=toys.called)
def test_methods_that_need_all_layers_are_refused_and_no_others(method: Any) -> None:
    rules = method.start(begin(method), Budget(4, 5), seed=1).rules
    if shares_all_it_trains(method):
        require_all_layers(method, rules)
        return
    with pytest.raises(Refused, match=r"plan\.depth") as refused:
        require_all_layers(method, rules)
    assert "plan.depth" in refused.value.remedy
