"""Summaries of clients: histograms that a client may give in the place of its texts.

No text is in them. Names of labels are, since labels must be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import Refused
from fedloom.core.schema import Decoder, Malformed, jsonable
from fedloom.core.seeds import derive
from fedloom.data.examples import Examples
from fedloom.data.private_histogram import noised
from fedloom.data.text_measures import Measure, words

Floats: TypeAlias = npt.NDArray[np.float64]
LENGTHS = tuple(sorted({round(2 ** (k / 4)) for k in range(57)}))
"""Lower edges of the bins of lengths, four to a doubling, from 1 to 16,384; the last one has no end."""
LOSSES = (0.0, *(0.05 * 2 ** (k / 4) for k in range(37)))
"""Lower edges of the bins of quality, counted downwards from 0 (the best), four to a doubling."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Histograms of one client's examples.

    Fields:
        client: its name.
        lengths: counts by length, in the bins `LENGTHS`.
        unit: unit of lengths.
        labels: counts by name of label (None: the examples have no named labels).
        quality: counts by quality, in the bins `LOSSES` (None: not measured).
        epsilon: differential privacy of the summary as a whole (None: true counts).
    """

    client: str
    lengths: tuple[float, ...]
    unit: str = "words"
    labels: Mapping[str, float] | None = None
    quality: tuple[float, ...] | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        histograms = [("lengths", self.lengths, LENGTHS), ("quality", self.quality or (0.0,) * len(LOSSES), LOSSES)]
        for name, counts, edges in histograms:
            if len(counts) != len(edges) or not all(0 <= count < math.inf for count in counts):
                raise Refused(f"summary.{name}", self.client, f"it needs {len(edges)} counts of at least 0")
        if not all(0 <= count < math.inf for count in (self.labels or {}).values()):
            raise Refused("summary.labels", self.client, "it needs counts of at least 0")

    @property
    def histograms(self) -> int:
        """Number of histograms that are present."""
        return 1 + (self.labels is not None) + (self.quality is not None)

    @property
    def examples(self) -> int:
        """Number of examples; as noisy as the lengths."""
        return round(sum(self.lengths))

    def median(self) -> float:
        """Median length, as if lengths were spread evenly within a bin."""
        below = np.cumsum(self.lengths)
        k = int((below * 2 >= below[-1]).argmax())
        ends = (*LENGTHS, LENGTHS[-1])
        share = (below[-1] / 2 - below[k] + self.lengths[k]) / (self.lengths[k] or 1.0)
        return float(ends[k] + share * (ends[k + 1] - ends[k]))


def summarise(client: str, examples: Examples, measure: Measure = words, unit: str = "words") -> Summary:
    """Summarise these examples; labels are left out where the only one has no name."""
    named = np.bincount(examples.labels, minlength=len(examples.names)).tolist()
    return Summary(
        client,
        _histogram(measure(examples), LENGTHS),
        unit,
        dict(zip(examples.names, map(float, named), strict=True)) if any(examples.names) else None,
        None if examples.quality is None else _histogram([-value for value in examples.quality], LOSSES),
    )


def private_summary(summary: Summary, epsilon: float, seed: int, labels: Sequence[str] = ()) -> Summary:
    """Add Laplace noise: epsilon-differential privacy for one example added or removed, all histograms together.

    `labels` names all labels that any client may have: which ones this client has must not show. Without it labels are left out.
    The seed is the client's secret. See `fedloom.data.private_histogram.noised`.

    Raises:
        Refused: a label that is not among `labels`, or `epsilon` is not positive.
    """
    strange = sorted(set(summary.labels or ()) - set(labels)) if labels else []
    if strange:
        raise Refused(
            "labels", tuple(labels), f"{len(strange)} label(s) of the client are not in the list; name all labels"
        )
    measured = (summary.lengths, *([summary.quality] if summary.quality else []))
    named = [(summary.labels or {}).get(name, 0.0) for name in labels]
    parts = len(measured) + bool(named)

    def noisy(counts: Sequence[float], what: str) -> tuple[float, ...]:
        return noised(counts, epsilon / parts, derive(seed, "summary", what), summary.client)

    return replace(
        summary,
        lengths=noisy(summary.lengths, "lengths"),
        quality=noisy(summary.quality, "quality") if summary.quality else None,
        labels=dict(zip(labels, noisy(named, "labels"), strict=True)) if labels else None,
        epsilon=epsilon,
    )


def encode_summary(summary: Summary) -> str:
    """Encode a summary as JSON."""
    return json.dumps(jsonable(summary), indent=1)


def parse_summary(text: str, where: str) -> Summary:
    """Read a summary from JSON; `where` names the file in messages. Raises Refused."""
    try:
        summary: Summary = Decoder().read(Summary, json.loads(text))
        return summary
    except (json.JSONDecodeError, Malformed) as error:
        remedy = f"this is no summary ({error}); write one with fedloom inspect DATA --client-summary FILE"
        raise Refused("DATA", where, remedy) from error


def bin_middles(edges: Sequence[float]) -> Floats:
    """Return the value that each bin stands for: its middle; the last one has no end and stands for its beginning."""
    ends = np.array([*edges[1:], edges[-1]], dtype=np.float64)
    return (np.array(edges) + ends) / 2


def _histogram(values: Sequence[float], edges: Sequence[float]) -> tuple[float, ...]:
    bins = np.searchsorted(edges, values, side="right") - 1
    return tuple(map(float, np.bincount(bins.clip(0), minlength=len(edges)).tolist()))
