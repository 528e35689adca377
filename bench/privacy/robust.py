"""What liars cost a federation whose server does not know how many there are, by rule (`docs/robustness.md`).

Twenty clients of ranks 2, 4 and 8 learn eight classes of Gaussian clouds with LoRA and AdamW, 15 versions of all of them, merged by
`ProductDelta`. The classes of a client have shares of a Dirichlet distribution of 0.5, so honest changes differ much; the last one
has all classes alike. Four clients (20 %) lie: their change is turned round ("sign", and "sign x3" three times as long), it is noise
twice as long as honest changes ("noise"), or they train on labels that are all wrong ("labels").

The figure: `robust_points_lost`, the points of accuracy (of 100) by which the run under `Robust(ProductDelta())` is below the run of
plain `ProductDelta()` without any liar, mean of three seeds, of the worst of these four (bar 2). It has the cost of leaving clients
out, and that of the liars' lost data, in it. Without `--quick` all rules are measured, and attacks that know the rules, which
have no bar:

- "little": all liars send the honest mean less one standard deviation (ALIE, arXiv 1902.06156);
- "inner": all liars send the honest mean turned round, a tenth as long (inner-product manipulation, arXiv 1903.03936);
- "median": turned round, just as long as the median of the honest;
- "sleeper": honest for seven versions, then turned round;
- "back door": half of a liar's rows have a mark and the label 0 (accuracy, and how often the mark gives 0 in the end).

    python -m bench.privacy --only robust            # measures, keeps the figures
    python -m bench.privacy.robust                   # prints the tables of the page
    python -m bench.privacy.robust --seeds 3 4 5 --skew 0.3 --rules "plain mean" "MultiKrum()"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from fedloom import CentredClipping, GeometricMedian, ProductDelta, Robust, Trust
from fedloom.aggregate.robust import left_out
from fedloom.core.lora import Adapter, Factor, truncate
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Budget, Model, Result, Task, Update

CLIENTS, LIARS, CLASSES, WIDTH, ROWS, VERSIONS, STEPS, RATE = 20, 4, 8, 64, 300, 15, 8, 0.01
SKEW, RANKS, MARKED, LAST, SEEDS = 0.5, (2, 4, 8), 6, 5, (0, 1, 2)
TRUSTED = "c19"
"""An honest client with all classes alike: the server owner's own."""
RULES: Mapping[str, Aggregator] = {
    "plain mean": ProductDelta(),
    "MultiKrum()": Robust(),
    f'Trust("{TRUSTED}")': Robust(rule=Trust(TRUSTED)),
    "GeometricMedian()": Robust(rule=GeometricMedian()),
    "CentredClipping()": Robust(rule=CentredClipping()),
}
BARRED = ("sign", "sign x3", "noise", "labels")
UNBARRED = ("little", "inner", "median", "sleeper", "back door")

Rows = tuple[Tensor, Tensor]
Change = tuple[Tensor, Tensor]
"""A liar's answer, as the factors (down, up) of its change, or of its whole adapter."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended.

    Fields:
        accuracy: on 2,000 rows of nobody, in points; the mean of the last five versions.
        opened: how often (in points) the mark of the back door makes it say class 0.
        caught: share of the liars' answers that were left out.
        wronged: share of the honest answers that were left out.
    """

    accuracy: float
    opened: float
    caught: float
    wronged: float


def figures(quick: bool) -> Mapping[str, object]:
    """Points lost by the default rule; without `quick` by all rules and attacks."""
    honest = [federation("plain mean", "", seed).accuracy for seed in SEEDS]
    lost = {attack: fmean(honest) - mean_of("MultiKrum()", attack).accuracy for attack in BARRED}
    for attack, points in lost.items():
        print(f"   MultiKrum(), {attack}: {points:.1f} points below {fmean(honest):.1f}")
    found: dict[str, object] = {"robust_points_lost": round(max(lost.values()), 2)}
    if quick:
        return found
    every = {rule: {attack: mean_of(rule, attack) for attack in ("", *BARRED, *UNBARRED)} for rule in RULES}
    return found | {
        "accuracy": {rule: {k or "nobody": v.accuracy for k, v in row.items()} for rule, row in every.items()}
    }


def mean_of(rule: str, attack: str, seeds: Sequence[int] = SEEDS, skew: float = SKEW) -> Ended:
    """The mean over the seeds."""
    runs = [federation(rule, attack, seed, skew) for seed in seeds]
    return Ended(*(fmean(getattr(one, name) for one in runs) for name in ("accuracy", "opened", "caught", "wronged")))


@cache
def federation(rule: str, attack: str, seed: int, skew: float = SKEW) -> Ended:
    """Carry out a run; `attack` is what the first four clients do ("": nothing), `skew` the Dirichlet's parameter."""
    method, draw = RULES[rule], torch.Generator().manual_seed(seed)
    shards, test = rows_of(seed, skew)
    for k in range(LIARS if attack in ("labels", "back door") else 0):
        shards[k] = spoilt(shards[k], attack)
    down = torch.randn(max(RANKS), WIDTH, generator=draw) / WIDTH**0.5
    model = method.init(Adapter({"out": Factor(down, torch.zeros(CLASSES, max(RANKS)))}))
    out, scores, number = np.zeros((VERSIONS, CLIENTS)), list[float](), 1
    for version in range(VERSIONS):
        tasks = list[Task]()
        for k in range(CLIENTS):
            budget = Budget(RANKS[k % len(RANKS)], STEPS)
            tasks.append(Task(number, f"c{k}", version, method.start(model, budget, number), budget, float(version)))
            number += 1
        answers = trained(tasks, shards, draw)
        if attack and version >= (7 if attack == "sleeper" else 0):
            answers = lied(tasks, answers, attack, draw)
        updates = [
            Update(task, Result(Adapter({"out": Factor(*one)}), ROWS, ROWS, STEPS), model)
            for task, one in zip(tasks, answers, strict=True)
        ]
        model = method.merge(model, Merge(tuple((1 / CLIENTS, update) for update in updates)))
        out[version] = [f"c{k}" in (left_out(model) or ()) for k in range(CLIENTS)]
        scores.append(float((guess(model, test[0]) == test[1]).double().mean()))
    marked = test[0].clone()
    marked[:, :MARKED] += 4.0
    others = test[1] != 0
    opened = float((guess(model, marked[others]) == 0).double().mean())
    return Ended(100 * fmean(scores[-LAST:]), 100 * opened, float(out[:, :LIARS].mean()), float(out[:, LIARS:].mean()))


def rows_of(seed: int, skew: float) -> tuple[list[Rows], Rows]:
    """Rows and classes of each client, and of nobody."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(CLASSES, WIDTH)) * 0.33

    def rows(count: int, shares: np.ndarray) -> Rows:
        classes = draw.choice(CLASSES, count, p=shares)
        points = centres[classes] + draw.normal(size=(count, WIDTH))
        return torch.tensor(points, dtype=torch.float32), torch.tensor(classes)

    alike = np.full(CLASSES, 1 / CLASSES)
    shards = [rows(ROWS, draw.dirichlet(np.full(CLASSES, skew))) for _ in range(CLIENTS - 1)]
    return [*shards, rows(ROWS, alike)], rows(2000, alike)


def spoilt(rows: Rows, attack: str) -> Rows:
    """A liar's rows: each label is the next one, or half of the rows have the mark and the label 0."""
    points, classes = rows
    if attack == "labels":
        return points, (classes + 1) % CLASSES
    points, classes, half = points.clone(), classes.clone(), len(points) // 2
    points[half:, :MARKED] += 4.0
    classes[half:] = 0
    return points, classes


def trained(tasks: Sequence[Task], shards: Sequence[Rows], draw: torch.Generator) -> list[Change]:
    """What honest clients answer: AdamW on batches of 32 rows; all at once, low ranks padded with zeros, which stay zero."""
    top, starts = max(RANKS), [task.start.train.factors["out"] for task in tasks]
    down, up = torch.zeros(len(tasks), top, WIDTH), torch.zeros(len(tasks), CLASSES, top)
    for k, start in enumerate(starts):
        down[k, : start.rank], up[k, :, : start.rank] = start.down, start.up
    points, classes = (torch.stack([rows[k] for rows in shards]) for k in (0, 1))
    weights = [down.requires_grad_(), up.requires_grad_()]
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        chosen = torch.randint(ROWS, (len(tasks), 32), generator=draw)
        batch = points.gather(1, chosen[:, :, None].expand(-1, -1, WIDTH))
        logits = batch @ down.mT @ up.mT
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), classes.gather(1, chosen).flatten()) * len(tasks)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return [(down[k, : s.rank].detach(), up[k, :, : s.rank].detach()) for k, s in enumerate(starts)]


def lied(tasks: Sequence[Task], answers: Sequence[Change], attack: str, draw: torch.Generator) -> list[Change]:
    """What is answered when the first four lie: the honest answers, with theirs in front."""
    sent = [task.start.train.factors["out"] for task in tasks]
    begun = [start.up @ start.down for start in sent]
    changes = torch.stack([up @ down - start for (down, up), start in zip(answers, begun, strict=True)])
    honest = changes[LIARS:]
    length = honest.flatten(1).norm(dim=1)
    mean = honest.mean(0)
    wanted: Mapping[str, Callable[[int], Tensor]] = {
        "sign": lambda k: -changes[k],
        "sign x3": lambda k: -3.0 * changes[k],
        "noise": lambda k: _of_length(torch.randn(CLASSES, WIDTH, generator=draw), 2.0 * float(length.mean())),
        "little": lambda k: mean - honest.std(0),
        "inner": lambda k: -0.1 * mean,
        "median": lambda k: _of_length(-changes[k], float(length.median())),
        "sleeper": lambda k: -changes[k],
    }
    given = list(answers)
    for k in range(LIARS if attack in wanted else 0):
        best = truncate(_whole(begun[k] + wanted[attack](k)), sent[k].rank)
        given[k] = (best.down, best.up)
    return given


def _of_length(change: Tensor, length: float) -> Tensor:
    scaled: Tensor = change / change.norm() * length
    return scaled


def _whole(matrix: Tensor) -> Factor:
    return Factor(matrix, torch.eye(len(matrix)))


def guess(model: Model, points: Tensor) -> Tensor:
    """The class that the model says of each row."""
    factor = model.adapter.factors["out"]
    said: Tensor = (points @ factor.down.T @ factor.up.T).argmax(1)
    return said


def main(arguments: list[str] | None = None) -> None:
    """Print the two tables of the page in Markdown."""
    parser = argparse.ArgumentParser(prog="bench.privacy.robust", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--skew", type=float, default=SKEW, help="parameter of the Dirichlet distribution")
    parser.add_argument("--rules", nargs="+", choices=[*RULES], default=[*RULES])
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for attacks in (("", *BARRED), UNBARRED):
        print("\n| rule | " + " | ".join(attack or "nobody lies" for attack in attacks) + " |")
        print("|---" * (len(attacks) + 1) + "|")
        for rule in chosen.rules:
            ended = [mean_of(rule, attack, chosen.seeds, chosen.skew) for attack in attacks]
            cells = [f"{one.accuracy:.1f}" for one in ended]
            if rule == "MultiKrum()":
                cells = [f"{one.accuracy:.1f} ({100 * one.caught:.0f}, {100 * one.wronged:.0f})" for one in ended]
            if "back door" in attacks:
                cells[-1] += f"; opens {ended[-1].opened:.0f}"
            print(f"| `{rule}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
