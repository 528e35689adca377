"""What the final model writes, beside what the base wrote before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.seeds import rng
from fedloom.train.generate import figures, write
from fedloom.train.settings import Generation

if TYPE_CHECKING:
    from fedloom.job import Job


def sample_lines(job: Job) -> list[dict[str, object]]:
    """For each of a few test examples the answers before and after, then the figures of all; none where labels are chosen."""
    asked, test, model = job.run.generation or Generation(), job.split.test, job.server.state.model
    if test.answers is None or asked.examples == 0:
        return []
    count = min(asked.examples, len(job.tested))
    chosen = sorted(rng(job.run.seed, "samples").sample(job.tested, count))
    references, most = [test.answers[i] for i in chosen], asked.max_new_tokens
    before = write(job.base, None, job.test_texts, chosen, most)
    after = write(job.base, model.adapter, job.test_texts, chosen, most, model.fold)
    lines: list[dict[str, object]] = [
        {
            "kind": "sample",
            "example": i,
            "request": test.texts[i],
            "context": test.pairs[i] if test.pairs else "",
            "reference": reference,
            "before": old,
            "after": new,
        }
        for i, reference, old, new in zip(chosen, references, before, after, strict=True)
    ]
    started = {f"base_{name}": value for name, value in figures(before, references).items()}
    return [*lines, {"kind": "generation", "examples": count, **figures(after, references), **started}]
