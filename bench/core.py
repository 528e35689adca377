"""Four figures that the core must not lose: the round trip, the same bytes, malformed answers, energy by direction.

    python -m bench.core [--quick]

Needs no network and no data: a small BERT and a small Llama with random weights, and a tokenizer of some thirty words,
are made in a temporary folder. `--quick` (about a minute on two free cores) measures the round trip at ranks 2, 4 and 8
instead of 1 to 8. The exit code is 0 if every bar is met. The last line is one JSON object:

- `roundtrip_error`: largest absolute difference of a logit between the trained adapter in memory and what peft and
  transformers load from an exported folder: both models, every rank, and with the adapter merged in (bar: 1e-5);
- `same_bytes`: whether two processes with different PYTHONHASHSEED write the same trace, metrics, adapter (bar: true);
- `malformed_tried`, `_accepted`, `_raised`: malformed answers thrown at a server with outstanding tasks, as `Result`s
  and as bytes; how many were let in, and how many did not end in a `Reject` or `Malformed` with a reason (bar: 0);
- `state_changed`: malformed answers after which the server's state was not what it was, to the bit (bar: 0);
- `energy2_start`, `_hlora`, `_default`: share of the energy in the first two directions at the start, and after ten
  rounds in which nobody learns anything, with HLoRA as published and with the default (bar: within 1 % of the start).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.energy import FEDERATION, ROUNDS, energies
from tests.support.malformed import malformed
from tests.support.roundtrip import BAR as ROUNDTRIP_BAR
from tests.support.roundtrip import roundtrip_errors
from tests.support.same_bytes import start_twins
from tests.support.tiny_models import RANKS, settle, tiny_decoder, tiny_encoder

ENERGY_BAR = 0.01
MALFORMED = 20_000


# The round trip ------------------------------------------------------------------------------------------------------


def roundtrip_error(ranks: Sequence[int]) -> float:
    """The largest difference over both models, all ranks, and merged."""
    worst = 0.0
    for name, build in (("BERT", tiny_encoder), ("Llama", tiny_decoder)):
        with tempfile.TemporaryDirectory() as folder:
            errors = roundtrip_errors(build(Path(folder, "model")), Path(folder), ranks)
        print(f"  {name:5s}  " + "  ".join(f"{what} {error:.1e}" for what, error in errors.items()), flush=True)
        worst = max(worst, *errors.values())
    return worst


# The whole -----------------------------------------------------------------------------------------------------------


def measure(ranks: Sequence[int]) -> dict[str, Any]:
    """All figures, each printed as it comes."""
    begun = time.perf_counter()

    def headline(text: str) -> None:
        print(f"[{time.perf_counter() - begun:5.1f} s] {text}", flush=True)

    headline(f"energy of the first two of {max(FEDERATION)} directions, {ROUNDS} rounds of zero learning")
    shares = energies(range(5))
    print("  " + "  ".join(f"{name.removeprefix('energy2_')} {share:.4f}" for name, share in shares.items()))
    headline(f"{MALFORMED:,} malformed answers")
    with tempfile.TemporaryDirectory() as folder:
        twins = start_twins(Path(folder))
        verdicts = malformed(MALFORMED)
        verdicts.show()
        headline("one seed in two processes")
        same = twins.same_bytes()
    headline("round trip: largest difference of a logit")
    error = roundtrip_error(ranks)
    headline("done")
    return {"roundtrip_error": error, "same_bytes": same, **verdicts.figures(), **shares}


def met(figures: Mapping[str, Any]) -> bool:
    """Whether every bar is met."""
    error = figures["roundtrip_error"]
    close = math.isfinite(error) and error <= ROUNDTRIP_BAR
    refused = not any(figures[name] for name in ("malformed_accepted", "malformed_raised", "state_changed"))
    level = abs(figures["energy2_default"] / figures["energy2_start"] - 1) <= ENERGY_BAR
    return close and figures["same_bytes"] and refused and level


def main() -> int:
    """Measure, print, and say by the exit code whether every bar is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the round trip at ranks 2, 4 and 8 only")
    given = parser.parse_args()
    settle()
    figures = measure(RANKS if given.quick else range(1, max(RANKS) + 1))
    print(json.dumps(figures))
    return 0 if met(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
