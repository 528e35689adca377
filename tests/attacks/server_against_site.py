"""A malicious server against a site: well-formed messages of a server with a valid certificate, to a worker with the default limits.

The server has the base model, sees all answers, and knows how the site works. Where an attack says `lifted`, the site's owner has
lifted what stops it (`[limits]` at their loosest, or terms accepted unseen); then it must succeed, or the test would be blind.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.core.lora import Adapter, Factor
from fedloom.core.types import Pruning, Result, Rules, TaskStart
from fedloom.deploy.messages.messages import (
    EvaluateResult,
    JoinRequest,
    Refusal,
    RunTerms,
    decode_reply,
    encode_request,
)
from fedloom.deploy.site import consent
from fedloom.train.settings import LoRA, Training
from tests.attacks.attack import Attack
from tests.attacks.site_stage import LARGE, QKV, ROWS, SECRET, STEPS, Stage, base_of, obeyed, stage_at
from tests.support.sites import LABELS

SAME = 1e-2
"""A token whose embedding lies so near to what an answer spans (share of its length) counts as read."""


# Texts ----------------------------------------------------------------------------------------------------------------


def spanning_start(first: Adapter, size: float = 1.0) -> TaskStart:
    """A start whose answer spans what enters the layers: `down` is zero, so what comes back is its gradient, times `up`."""
    draw = torch.Generator().manual_seed(1)
    factors = {
        name: Factor(torch.zeros_like(one.down), size * torch.randn(one.up.shape, generator=draw))
        for name, one in first.factors.items()
        if "layer.0." in name
    }
    whole = {
        name: factors.get(name, Factor(torch.zeros_like(one.down), torch.ones_like(one.up)))
        for name, one in first.factors.items()
    }
    return TaskStart(Adapter(whole, first.dense), "x")


@torch.no_grad()
def tokens_read(stage: Stage, terms: RunTerms, result: Result) -> list[tuple[int, int]]:
    """The tokens (place, number) whose embeddings lie in what the answer's `down` rows of the first layer span."""
    downs = [one.down for name, one in result.adapter.factors.items() if "layer.0." in name]
    _, sizes, rows = torch.linalg.svd(torch.cat(downs).double(), full_matrices=False)
    span = rows[sizes > 1e-5 * sizes[0]]
    model: Any = base_of(stage.model, terms.lora, min(terms.rank, 64), terms.seed).model
    embed = model.get_base_model().bert.embeddings
    found = []
    for place in range(20):
        at = embed.position_embeddings.weight[place] + embed.token_type_embeddings.weight[0]
        inputs: Tensor = embed.LayerNorm(embed.word_embeddings.weight + at).double()
        rest = (inputs - (inputs @ span.T) @ span).norm(dim=1) / inputs.norm(dim=1)
        found += [(place, token) for token in torch.nonzero(rest < SAME).flatten().tolist()]
    return found


def texts_read(stage: Stage, terms: RunTerms, told: Any) -> int:
    """How many rows of the site can be written down whole from an answer, and from nothing else."""
    if not obeyed(told):
        return 0
    found = tokens_read(stage, terms, told)
    places = [place for place, _ in found]
    if len(found) > 40 or len(set(places)) < len(places):  # the span is (nearly) everything: it tells nothing
        return 0
    tokenizer = base_of(stage.model, terms.lora, min(terms.rank, 64), terms.seed).tokenizer
    read = [token for _, token in sorted(found)]
    return sum(tokenizer(row["text"])["input_ids"] == read for row in stage.rows)


LINEAR = Training(learning_rate=1e8, batch_size=8, max_length=32, clip=1e-16, bucket=False, keep_moments=False)
"""AdamW hands gradients through: they are far below what it adds to their size."""


def text_of_the_only_row(folder: Path, lifted: bool) -> int:
    """All rows but one are held out, by the server's wish; one step."""
    stage = stage_at(folder, lifted)
    terms = stage.terms(rank=16, held_out=1 - 1e-6, training=LINEAR, steps=1)
    return texts_read(stage, terms, stage.task(terms, spanning_start(stage.first(terms)), 1))


def text_by_a_batch_of_one(folder: Path, lifted: bool) -> int:
    """A step is a single row."""
    stage = stage_at(folder, lifted)
    terms = stage.terms(rank=16, held_out=0.0, training=replace(LINEAR, batch_size=1), steps=1)
    return texts_read(stage, terms, stage.task(terms, spanning_start(stage.first(terms)), 1))


def text_by_a_remainder_of_one(folder: Path, lifted: bool) -> int:
    """Nine rows in batches of eight: once the last batch of a pass was a single row. Lifted: the batch is one on purpose."""
    stage = stage_at(folder, True, rows=9)
    training = replace(LINEAR, batch_size=1 if lifted else 8)
    terms = stage.terms(rank=16, held_out=0.0, training=training, steps=1)
    tried = [stage.task(terms, spanning_start(stage.first(terms)), 1) for _ in range(6)]
    return sum(texts_read(stage, terms, told) for told in tried)


def text_within_all_limits(folder: Path, lifted: bool) -> int:
    """Everything as near to a bare gradient as the limits allow: the answer's 24 directions are mixtures of a thousand tokens."""
    stage = stage_at(folder, lifted)
    training = Training(learning_rate=1e-3, batch_size=8, max_length=16, clip=0.1, bucket=True, keep_moments=False)
    lora = LoRA(dropout=0.0, target_modules=QKV, scaling=0.1)
    terms = stage.terms(rank=8, lora=lora, training=training, held_out=0.4)
    if lifted:
        terms = stage.terms(rank=16, lora=lora, training=replace(training, batch_size=1), steps=1, held_out=0.0)
    start = spanning_start(stage.first(terms), 1e-8 if lifted else 1.1e-5)
    told = [stage.task(terms, start, terms.steps) for _ in range(3)]
    assert not any(isinstance(one, Refusal) for one in told), "it is within the limits"
    return max(texts_read(stage, terms, one) for one in told)


# Labels and membership -------------------------------------------------------------------------------------------------


def always(first: Adapter, label: int) -> Adapter:
    """A model that always says this label."""
    bias = torch.zeros(len(LABELS))
    bias[label] = 50.0
    heads = {
        name: torch.zeros_like(one) if one.ndim == 2 else bias
        for name, one in first.dense.items()
        if one.shape[0] == len(LABELS)
    }
    assert heads
    return Adapter(first.factors, {**first.dense, **heads})


def label_of_one_row(folder: Path, lifted: bool) -> int:
    """An evaluation over a single row: whether the model is right is the row's label."""
    stage, read = stage_at(folder, lifted, rows=6), 0
    for share in (0.1, 0.2, 0.3, 0.4):  # which rows it holds out, the site draws
        terms = stage.terms(held_out=share)
        told = stage.evaluate(terms, always(stage.first(terms), 1))
        if isinstance(told, Refusal):
            assert "[limits] least_scored = " in told.reason or "holds no example out" in told.reason, told.reason
        read += isinstance(told, EvaluateResult) and told.examples == 1
    return read


def labels_by_many_evaluations(folder: Path, lifted: bool) -> bool:
    """Shares that differ by little: the difference of two counts is a few rows."""
    stage = stage_at(folder, lifted)
    told = [stage.terms(held_out=share, evaluations=1) for share in (0.40, 0.41)]
    results = [stage.evaluate(terms, always(stage.first(terms), 1)) for terms in told]
    return all(obeyed(one, "evaluations") for one in results)


def labels_between_two_runs(folder: Path, lifted: bool) -> int:
    """Two runs, both accepted, with shares that differ by little: the counts differ by the labels of the rows between them."""
    stage, told = stage_at(folder, lifted), list[EvaluateResult]()
    for number, share in enumerate((0.400, 0.405, 0.41, 0.415, 0.42)):
        terms = stage.terms(held_out=share, run_hash=f"{number:012x}")
        result = stage.evaluate(terms, always(stage.first(terms), 1))
        if isinstance(result, Refusal):
            assert "[limits] least_scored = " in result.reason, result.reason
            assert "beside an earlier evaluation" in result.reason, result.reason
        else:
            told.append(result)
    steps = [(after.examples - before.examples, after.correct - before.correct) for before, after in pairwise(told)]
    return sum(rows for rows, right in steps if right in (0, rows))


def evaluations_without_end(folder: Path, lifted: bool) -> bool:
    """The same run, another model each time."""
    stage = stage_at(folder, lifted)
    terms = stage.terms()
    return all(obeyed(stage.evaluate(terms, always(stage.first(terms), label)), "evaluations") for label in (0, 1))


def losses_of_held_out_rows(folder: Path, lifted: bool) -> bool:
    """Sums of losses tell more of each row than counts do."""
    stage = stage_at(folder, lifted)
    terms = stage.terms()
    told = stage.evaluate(terms, always(stage.first(terms), 1))
    return isinstance(told, EvaluateResult) and told.loss is not None


def many_passes_over_the_rows(folder: Path, lifted: bool) -> bool:
    """Four passes in one task: then a text that the server knows is recognised (docs/leakage.md)."""
    stage = stage_at(folder, lifted)
    terms = stage.terms(steps=200, held_out=0.0)
    return obeyed(stage.task(terms, TaskStart(stage.first(terms), "x"), 4 * ROWS // 8, rank=8), "epochs")


def many_passes_task_after_task(folder: Path, lifted: bool) -> bool:
    """One pass a task, until a run has had more than its owner said."""
    stage = stage_at(folder, lifted, "" if lifted else "total_epochs = 2.0\n")
    terms = stage.terms(steps=ROWS // 8, held_out=0.0)
    start = TaskStart(stage.first(terms), "x")
    return all(obeyed(stage.task(terms, start, ROWS // 8, rank=8), "total_epochs") for _ in range(3))


# The split, draws, noise ----------------------------------------------------------------------------------------------


def split_by_the_servers_seed(folder: Path, lifted: bool) -> bool:
    """Another seed of the run, to choose which rows are held out. Lifted: the site's own secret is another one."""
    one, other = (stage_at(folder / str(number), True) for number in range(2))
    if lifted:
        other.worker.secret = SECRET[::-1]
    shards = []
    for stage, seed in ((one, 1), (other, 2)):
        stage.join(stage.terms(seed=seed))
        assert stage.worker.prepared is not None
        shards.append(stage.worker.prepared.shard.held_out)
    return shards[0] != shards[1]


def noise_averaged_out(folder: Path, lifted: bool) -> bool:
    """The same task again and again, and the mean of the answers. Lifted: the site begins anew, by another secret."""
    noise = "[privacy]\nclip = 1.0\nmultiplier = 1.0\n"
    stage = stage_at(folder, True, privacy=noise)
    terms = stage.terms(held_out=0.0)
    start, answers = TaskStart(stage.first(terms), "x"), list[dict[str, Tensor]]()
    for time in range(2):
        if lifted and time:
            stage = stage_at(folder / "anew", True, privacy=noise)
            stage.worker.secret = SECRET[::-1]
        stage.number = 0
        told = stage.task(terms, start, STEPS)
        assert isinstance(told, Result)
        answers.append({name: one.down for name, one in told.adapter.factors.items()})
        shutil.rmtree(stage.worker.site.folder / "journal")  # a site that has lost what it has answered
    one, other = answers
    return any(not one[name].equal(other[name]) for name in one)


# What a message may ask for --------------------------------------------------------------------------------------------


def refused(change: Callable[[Stage], Any], limit: str) -> Callable[[Path, bool], bool]:
    """An attack that is a request: it succeeds if the site does as it is told. It is refused for the sake of this limit."""

    def run(folder: Path, lifted: bool) -> bool:
        return obeyed(change(stage_at(folder, lifted)), f"{limit} = ")

    return run


def offer(limit: str, **more: Any) -> Callable[[Path, bool], bool]:
    """A run with these terms."""
    return refused(lambda stage: stage.join(stage.terms(**more)), limit)


def offer_training(limit: str, **more: Any) -> Callable[[Path, bool], bool]:
    """A run with these settings of training."""
    return refused(lambda stage: stage.join(stage.terms(training=replace(stage.terms().training, **more))), limit)


def order(change: Callable[[Stage, RunTerms, TaskStart], Any], limit: str, **more: Any) -> Callable[[Path, bool], bool]:
    """A task of such a run."""

    def send(stage: Stage) -> Any:
        terms = stage.terms(held_out=0.0, **more)
        return change(stage, terms, TaskStart(stage.first(terms), "x"))

    return refused(send, limit)


def folded(stage: Stage, terms: RunTerms, start: TaskStart) -> Any:
    """A task that changes the frozen model: the server then decides what the layers see."""
    return stage.task(terms, replace(start, fold=start.train), STEPS)


def steered(stage: Stage, terms: RunTerms, start: TaskStart) -> Any:
    """A task that adds the server's numbers to every gradient."""
    return stage.task(terms, replace(start, control=start.train), STEPS)


def scaled(limit: str, size: float) -> Callable[[Path, bool], bool]:
    """A task whose adapter counts so much, or so little."""
    return order(lambda stage, terms, start: stage.task(terms, replace(start, scaling=size), STEPS), limit)


def sized(limit: str, size: float) -> Callable[[Path, bool], bool]:
    """A task that begins with numbers of this size."""
    return order(lambda stage, terms, start: stage.task(terms, spanning_start(start.train, size), STEPS), limit)


def ruled(limit: str, **rules: Any) -> Callable[[Path, bool], bool]:
    """A task under these rules."""
    return order(lambda stage, terms, start: stage.task(terms, replace(start, rules=Rules(**rules)), STEPS), limit)


def budgeted(limit: str, steps: int = STEPS, rank: int = 8) -> Callable[[Path, bool], bool]:
    """A task of so many steps at this rank."""
    return order(lambda stage, terms, start: stage.task(terms, start, steps, rank), limit, rank=rank)


def chosen_in_a_step(folder: Path, lifted: bool) -> bool:
    """Two steps, of which the first only chooses directions: what is sent was trained in one."""
    stage = stage_at(folder, lifted, "least_rows = 1")
    terms = stage.terms(held_out=0.0)
    start = TaskStart(stage.first(terms), "x", rules=Rules(select=8))
    return obeyed(stage.task(terms, start, 2), "least_steps = ")


def directions_far_away(folder: Path, lifted: bool) -> bool:
    """What stays at a site has room for all directions up to the last: one number asks for memory and disk. Lifted: it is small."""
    stage = stage_at(folder, False)
    terms = stage.terms(held_out=0.0)
    last = terms.rank - 1 if lifted else 10**5
    start = TaskStart(stage.first(terms), "x", directions=(*range(terms.rank - 1), last), rules=Rules(private=("up",)))
    return isinstance(stage.task(terms, start, STEPS), Result)


def scored_all_the_same(folder: Path, lifted: bool) -> bool:
    """The owner accepted that rows are held out, and no evaluation of them. Lifted: one."""
    stage = stage_at(folder, False)
    terms = stage.terms(evaluations=int(lifted))
    return isinstance(stage.evaluate(terms, always(stage.first(terms), 1)), EvaluateResult)


def unseen_terms(folder: Path, lifted: bool) -> bool:
    """A run that the owner has not accepted. Lifted: it was accepted."""
    stage = stage_at(folder, False)
    if not lifted:
        stage.worker.consents = consent.Consents(stage.worker.site.folder)  # no owner who accepts at once
    return not isinstance(stage.join(stage.terms()), Refusal)


def changed_terms(folder: Path, lifted: bool) -> bool:
    """Accepted terms, and then others under the same name and hash of the run. Lifted: those were accepted too."""
    stage = stage_at(folder, False)
    assert not isinstance(stage.join(stage.terms()), Refusal)
    if not lifted:
        stage.worker.consents = consent.Consents(stage.worker.site.folder)
        assert not isinstance(stage.join(stage.terms()), Refusal)
    return not isinstance(stage.join(stage.terms(held_out=0.4)), Refusal)


def beyond_its_terms(folder: Path, lifted: bool) -> bool:
    """A task with more steps than the accepted terms say. Lifted: they say so many."""
    stage = stage_at(folder, False)
    terms = stage.terms(held_out=0.0, steps=STEPS if lifted else STEPS - 1)
    return isinstance(stage.task(terms, TaskStart(stage.first(terms), "x"), STEPS), Result)


def another_model(folder: Path, lifted: bool) -> bool:
    """Terms that do not say which weights the base model has, so that the site could be made to train on a model of the server's."""
    stage = stage_at(folder, lifted)
    return not isinstance(stage.join(stage.terms(weights="")), Refusal)


def tasks_without_end(folder: Path, lifted: bool) -> bool:
    """Task after task on one day."""
    stage = stage_at(folder, lifted, "" if lifted else "tasks_a_day = 2\n")
    terms = stage.terms(held_out=0.0)
    start = TaskStart(stage.first(terms), "x")
    return all(obeyed(stage.task(terms, start, STEPS), "tasks_a_day") for _ in range(3))


def bytes_without_end(folder: Path, lifted: bool) -> bool:
    """Answers of more bytes than the owner lets out on one day."""
    stage = stage_at(folder, lifted, "" if lifted else "megabytes_a_day = 0.06\n")
    terms = stage.terms(held_out=0.0)
    start = TaskStart(stage.first(terms), "x")
    return all(obeyed(stage.task(terms, start, STEPS), "megabytes_a_day") for _ in range(3))


PATTERN = r"(([a-z]+)[._0-9]?)+Z"
"""Takes for ever on a name of a layer, and holds the interpreter meanwhile."""


def expression_that_hangs(folder: Path, lifted: bool) -> bool:
    """A regular expression in the place of the layers' names. Lifted: it is run, as libraries do."""
    if lifted:
        process = multiprocessing.get_context("spawn").Process(
            target=re.fullmatch, args=(PATTERN, "base_model.model.bert.encoder.layer.attention.self.query"), daemon=True
        )
        process.start()
        process.join(3.0)
        hangs = process.is_alive()
        process.kill()
        return hangs
    stage = stage_at(folder, False)
    body = encode_request(JoinRequest(stage.terms(), 1))
    told = decode_reply(stage.worker.answer(_with_pattern(body)), LARGE, {})
    return not isinstance(told, Refusal)


def _with_pattern(body: bytes) -> bytes:
    """The same message with an expression where names of layers stand; a server need not keep to what `RunTerms` allows."""
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    text = json.dumps(header)
    names = json.dumps(json.dumps(list(QKV), separators=(",", ":")))[1:-1]
    assert names in text
    changed = text.replace(names, json.dumps(json.dumps(PATTERN))[1:-1]).encode()
    return len(changed).to_bytes(8, "little") + changed + body[8 + length :]


def _named(name: str, run: Callable[[Path, bool], int], **more: Any) -> Attack:
    return Attack(f"a server {name}", run, **more)


def _readings() -> Iterator[Attack]:
    yield _named(
        "reads the text of the only row it leaves to train on", text_of_the_only_row, reads="texts", in_gate=True
    )
    yield _named("reads a text from a batch of one row", text_by_a_batch_of_one, reads="texts")
    yield _named("reads a text from the remainder of a pass", text_by_a_remainder_of_one, reads="texts")
    yield _named(
        "reads a text as near to a bare gradient as the limits allow",
        text_within_all_limits,
        reads="texts",
        in_gate=True,
    )
    yield _named("reads a label from an evaluation of one row", label_of_one_row, reads="labels", in_gate=True)
    yield _named("reads labels from shares that differ by little", labels_by_many_evaluations, reads="labels")
    yield _named("reads labels from two runs whose shares differ by little", labels_between_two_runs, reads="labels")
    yield _named("evaluates a run again and again", evaluations_without_end)
    yield _named("gets losses of held-out rows", losses_of_held_out_rows)
    yield _named("asks for many passes over the rows in one task", many_passes_over_the_rows)
    yield _named("asks for many passes over the rows, task after task", many_passes_task_after_task)
    yield _named("chooses which rows are held out", split_by_the_servers_seed, in_gate=True)
    yield _named("averages a site's noise out", noise_averaged_out)


def _requests() -> Iterator[Attack]:
    yield _named("offers a run that the owner has not seen", unseen_terms)
    yield _named("changes the terms of a run", changed_terms, in_gate=True)
    yield _named("goes beyond its own terms", beyond_its_terms)
    yield _named("does not say which base model it means", another_model)
    yield _named("sends tasks without end", tasks_without_end)
    yield _named("draws answers without end", bytes_without_end, in_gate=True)
    yield _named("sends an expression that hangs the worker", expression_that_hangs, processes=True)
    yield _named("changes the frozen model", order(folded, "folds", folds=True))
    yield _named("adds numbers to gradients", order(steered, "controls", controls=True))
    yield _named("scales the adapter down", scaled("least_scaling", 1e-9))
    yield _named("scales the adapter up", scaled("scaling", 1e6))
    yield _named("begins with tiny numbers", sized("least_values", 1e-12))
    yield _named("begins with huge numbers", sized("values", 1e9))
    yield _named("sends a high rank", budgeted("rank", rank=16))
    yield _named("asks for a single step", budgeted("least_steps", steps=1))
    yield _named("trains on few of the rows", budgeted("least_rows", steps=4))
    yield _named("multiplies the rate of `up`", ruled("learning_rate", up_rate=1e6))
    yield _named("trains `up` at a rate at which nothing moves", ruled("least_learning_rate", up_rate=1e-9))
    yield _named("hides a single step behind a choice of directions", chosen_in_a_step)
    yield _named("fills the memory with directions that nobody has", directions_far_away)
    yield _named("scores what its terms say is not scored", scored_all_the_same)
    yield _named("drowns the data in a penalty on ranks", ruled("pruning", pruning=Pruning(strength=1e6)))
    yield _named("makes AdamW linear by its clip", offer_training("least_clip", clip=1e-16), in_gate=True)
    yield _named("asks for a huge rate", offer_training("learning_rate", learning_rate=1e8))
    yield _named("asks for a rate at which nothing moves", offer_training("least_learning_rate", learning_rate=1e-9))
    yield _named("drowns the data in a pull", offer_training("proximal", proximal=1e6))
    yield _named("asks for huge batches", offer_training("batch", batch_size=10**6))
    yield _named("asks for endless texts", offer_training("length", max_length=10**6))
    yield _named("asks for texts of four tokens", offer_training("least_length", max_length=4))
    yield _named("decays weights to nothing", offer_training("weight_decay", weight_decay=100.0))
    yield _named("asks for many threads", offer("threads", threads=64))
    yield _named("drops out all inputs but one", offer("dropout", lora=LoRA(dropout=0.98, target_modules=QKV)))


ATTACKS = (*_readings(), *_requests())
