"""Every method against its oracle (`oracles.py`): mixed ranks, partial participation, late answers, merge after merge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import fedloom.aggregate
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model
from tests.support import toys
from tests.support.equations import round_of
from tests.support.oracle_cases import BAR, FORMS, MORE, TOP, Answer, answered, errors
from tests.support.oracles import ORACLES, oracle_of
from tests.support.storms import tries
from tests.support.toys import sent


def test_every_method_has_an_oracle_and_every_oracle_a_method() -> None:
    methods = toys.classes(fedloom.aggregate, toys.AGGREGATOR)
    assert set(ORACLES) <= set(methods)
    assert all(callable(oracle_of(cls())) for cls in methods)


ANSWERS = st.lists(
    st.builds(Answer, st.integers(1, TOP), st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=4
).filter(lambda drawn: any(answer.weight for answer in drawn))
MERGES = st.lists(st.tuples(ANSWERS, FORMS), min_size=1, max_size=3)
EVERYTHING = [
    ([Answer(8, 3, False, False), Answer(3, 2, False, True), Answer(8, 4, False, False)], (1.0, False)),
    ([Answer(8, 1, True, False), Answer(2, 5, False, True), Answer(5, 0, False, False)], (0.3, False)),
    ([Answer(1, 1, False, False), Answer(2, 2, True, False)], (0.3, True)),
    ([Answer(2, 1, False, False), Answer(1, 1, True, False)], (1.0, False)),
]
"""Full and low ranks, late, pruned and weightless answers; a whole step, mixing steps, changes; directions that nobody holds."""


def merge_of(method: Aggregator, models: list[Model], answers: list[Answer], form: tuple[float, bool]) -> Merge:
    """Answers to the last model, or to the one before it."""
    total, parts = sum(answer.weight for answer in answers), []
    for k, answer in enumerate(answers):
        model = models[-2 if answer.late and len(models) > 1 else -1]
        task = replace(sent(method, model, answer.rank, 100 * len(models) + k), client=f"c{k}")
        parts.append((answer.weight / total, answered(task, answer.prune)))
    return Merge(tuple(parts), *form)


@pytest.mark.parametrize("method", toys.aggregators() + MORE, ids=toys.called)
@given(merges=MERGES)
@example(merges=EVERYTHING)
@tries(10)
def test_the_model_is_what_the_paper_says(method: Aggregator, merges: list[tuple[list[Answer], Any]]) -> None:
    """The oracle goes on from the float32 model of each merge, so that roundings do not add up."""
    start = toys.graded([0.5**i for i in range(TOP)])
    models = [method.init(replace(start, dense={"head": torch.tensor([1.0, -2.0, 0.5])}))]
    for answers, form in merges:
        merge = merge_of(method, models, answers, form)
        models.append(method.merge(models[-1], merge))
        r = round_of(models[-2], merge)
        found = errors(models[-1], r, oracle_of(method)(method, r))
        assert max(found.values()) < BAR, found
