"""Model families: what each can do here, tried on tiny models with random weights.

    python -m bench.models [--quick] [--only NAME ...]
    python -m bench.models --table

Each family of `tests/support/families.py` goes through the law of `tests/support/family_law.py`: for labels and for answers, with its
default layers and with all linear ones, it is loaded, trained, cut at two depths, trained with another client in one pass and in
bfloat16, exported at two ranks, merged and let generate. `--quick` measures fewer facts of all linear layers and keeps nothing;
otherwise a line for each case is written to `results/models.jsonl`, from which `--table` makes the table in `docs/models.md`.

The last line is one JSON object:

- `families`: how many there are;
- `refused_with_reason`: families of which something is refused that transformers has a class for, with the reason;
- `silent_or_traceback`: facts that are wrong, or end in an error that is no refusal (bar 0);
- `largest_depth_gap`: relative gap of logits between a pass from the first trained block on and a plain pass (bar 0);
- `largest_merge_gap`, `largest_export_gap`: relative gap of logits between the merged or exported model and ours (bar 1e-5);
- `largest_gradient_gap`: of gradients at partial depth and in a common pass.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from fedloom.train import peft_weights
from tests.support.families import FAMILIES
from tests.support.family_law import Case, begins_at_trained_blocks, cases_of, has_class, measure, shares_passes
from tests.support.tiny_models import settle

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "models.jsonl", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m bench.models --table -->", "<!-- end of table -->"
QUICK_FACTS = ("trains", "depth", "common pass")
"""Facts of all linear layers that `--quick` measures."""


@dataclass(frozen=True, slots=True)
class Row:
    """The findings of one case as they are kept.

    Fields:
        family, kind: of the case.
        use: "labels" or "answers".
        layers: "default" or "all-linear".
        available: whether transformers has a class for this use.
        adapted: last parts of the names of the adapted layers.
        shares_passes: whether clients are trained in one pass.
        short_passes: whether a pass of partial depth begins at the first trained block.
        gaps: figures by fact.
        refused: reasons by fact.
        failed: errors, and figures that are too large, by fact.
    """

    family: str
    kind: str
    use: str
    layers: str
    available: bool
    adapted: Sequence[str]
    shares_passes: bool
    short_passes: bool
    gaps: Mapping[str, float]
    refused: Mapping[str, str]
    failed: Mapping[str, str]


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each case, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.models", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer facts of all linear layers; keep nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[*FAMILIES], help="some families; keep nothing")
    parser.add_argument("--table", action="store_true", help=f"write the table of {PAGE.name} from what was kept")
    options = parser.parse_args(arguments)
    if options.table:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_table(text, kept_rows()), encoding="utf-8")
        return
    rows = []
    context = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, initializer=settle) as pool:
        for found in pool.map(partial(rows_of, quick=options.quick), options.only):
            rows += found
            print_rows(found)
    if not options.quick and len(options.only) == len(FAMILIES):
        RESULTS.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    print(json.dumps(summary(rows)))


def rows_of(name: str, quick: bool) -> list[Row]:
    """Measure all cases of one family."""
    return [row_of(case, QUICK_FACTS if quick and case.targets else ()) for case in cases_of(FAMILIES[name])]


def row_of(case: Case, facts: Sequence[str]) -> Row:
    """Measure some facts (none given: all) of one case."""
    with tempfile.TemporaryDirectory() as place:
        findings, scene = measure(case, Path(place), facts)
    adapted = peft_weights.lora_layers(scene.base.model) if scene else ()
    return Row(
        family=case.family.name,
        kind=case.family.kind,
        use="answers" if case.writes else "labels",
        layers=case.targets or "default",
        available=has_class(case),
        adapted=sorted({name.rpartition(".")[2] for name in adapted}),
        shares_passes=bool(scene and shares_passes(scene)),
        short_passes=bool(scene and begins_at_trained_blocks(scene)),
        gaps={f.fact: f.gap for f in findings if not f.refused and not f.failed},
        refused={f.fact: f.refused for f in findings if f.refused},
        failed={f.fact: f.failed or f"gap {f.gap:.2g}" for f in findings if not f.holds},
    )


def print_rows(rows: Sequence[Row]) -> None:
    """Print a line for each case, and one for each refusal and failure."""
    for row in rows:
        gaps = "  ".join(f"{fact} {gap:.1g}" for fact, gap in row.gaps.items() if gap)
        print(f"{row.family}, {row.use}, {row.layers}: {gaps or 'nothing measured'}", flush=True)
        for fact, reason in row.refused.items():
            print(f"    {fact} refused: {reason}")
        for fact, reason in row.failed.items():
            print(f"    {fact} WRONG: {reason}")


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of the last line."""
    return {
        "families": len({row.family for row in rows}),
        "refused_with_reason": len({row.family for row in rows if row.refused and row.available}),
        "silent_or_traceback": sum(len(row.failed) for row in rows),
        "largest_depth_gap": largest(rows, "depth"),
        "largest_merge_gap": largest(rows, "merge"),
        "largest_export_gap": largest(rows, "export"),
        "largest_gradient_gap": max(largest(rows, "depth gradients"), largest(rows, "common pass")),
    }


def largest(rows: Sequence[Row], fact: str) -> float:
    """The largest gap of a fact, two digits."""
    return float(f"{max((row.gaps[fact] for row in rows if fact in row.gaps), default=0.0):.2g}")


# The table -------------------------------------------------------------------------------------------------------------


def kept_rows() -> list[Row]:
    """What the last full measurement kept."""
    return [Row(**json.loads(line)) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def with_table(text: str, rows: Sequence[Row]) -> str:
    """The text of a page with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    return before + "\n".join([BEGIN, *table_lines(rows), END]) + rest.partition(END)[2]


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each family, and one for each reason below the table."""
    yield "| family | labels | answers | default layers | all linear | depth | one pass | bfloat16 | export, merge | generate |"
    yield "|" + "---|" * 10
    for name in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == name]
        first = next((row for row in own if row.adapted and row.layers == "default"), own[0])
        made = [row for row in own if row.adapted]
        cells = [
            name,
            *(word_of([row for row in own if row.use == use], ("loads", "trains")) for use in ("labels", "answers")),
            ", ".join(first.adapted),
            word_of([row for row in own if row.layers == "all-linear"], ("loads", "trains")),
            word_of(own, ("depth", "depth gradients", "kept activations"), all(row.short_passes for row in made)),
            word_of(own, ("common pass",), all(row.shares_passes for row in made)),
            *(word_of(own, facts) for facts in (("bfloat16",), ("export", "merge"), ("generation",))),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for row in rows:
        if row.layers == "default" and row.refused:
            facts, reason = ", ".join(row.refused), next(iter(row.refused.values()))
            yield f"- {row.family}, {row.use} ({facts}): {reason}."


def word_of(rows: Sequence[Row], facts: Sequence[str], gained: bool = True) -> str:
    """ "yes" where all these facts hold, "slow" where nothing is `gained`, "refused" or "wrong" where one is, "" if unmeasured."""
    known = [row for row in rows if any(fact in row.gaps for fact in facts)]
    if any(fact in row.failed for row in rows for fact in facts):
        return "wrong"
    if any(fact in row.refused for row in known or rows for fact in facts):
        return "refused" if any(row.available for row in rows) else ""
    return ("yes" if gained else "slow") if known else ""


if __name__ == "__main__":
    main()
