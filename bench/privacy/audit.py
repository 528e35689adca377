"""Does the audit tell noise that is too small from noise that is not?

Each case is a server of the core with the noise of `Private`, over toy adapters of canary clients (`audit.noise_check`): 20 runs
with the declared noise, and 20 with half of it, where the secret source halves its draws and everything else, the ledger too, is as
declared. Independent noise, banded noise, and the steps of a site that protects records, by turns. `--quick` measures the same.

Bars: no alarm in the sound runs (`audit_false_alarms`), one in each of the others (`audit_missed`). The alarm is that even the lower
end of the estimate is above the accounted epsilon: the estimate itself is right in the mean, so in about half of the sound runs it is
above. Printed beside it: how many estimates were above, and how many certified bounds (none is expected, in either half).

Not measured here: attacks on rows of clients, which `python -m bench.leakage` measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fedloom.audit.findings import NoiseCheck
from fedloom.audit.noise_check import check_client_noise, check_record_noise
from fedloom.core.seeds import simulated_secret
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import RecordDraws
from fedloom.privacy.secret_noise import SecretNoise

RUNS, DELTA = 20, 1e-5
CASES = (
    Private(0.5, 1.0, 1),
    Private(0.5, 1.5, 3),
    Private(2.0, 3.0, 3),
    Private(0.5, 1.0, 3, noise="banded", apart=4),
    Private(1.0, 1.0, 10, unit="record"),
)
ROWS, BATCH, STEPS = 200, 64, 40
"""Of the site that protects records."""


class HalvedNoise(SecretNoise):
    """A source of noise that draws half of what it should, as a bug would."""

    def normals(self, shapes: Mapping[str, Tensor], *names: str | int) -> Iterator[Tensor]:
        """Yield normal numbers with a standard deviation of one half."""
        return (drawn / 2 for drawn in SecretNoise.normals(self, shapes, *names))


class HalvedDraws(RecordDraws):
    """Draws of a site that adds half of the noise that it should."""

    def noisy_mean(
        self, step: int, clipped: Mapping[str, Tensor], private: Private, expected: float
    ) -> dict[str, Tensor]:
        """Return the mean with half of the noise."""
        noisy = RecordDraws.noisy_mean(self, step, clipped, private, expected)
        return {name: (mean + clipped[name] / expected) / 2 for name, mean in noisy.items()}


def figures(quick: bool) -> Mapping[str, object]:
    """Count alarms in sound runs, and halved noise without one."""
    alarms = {half: count_alarms([check(half, run) for run in range(RUNS)], half) for half in (False, True)}
    return {"audit_false_alarms": alarms[False], "audit_missed": RUNS - alarms[True]}


def check(halved: bool, run: int) -> NoiseCheck:
    """Check the noise of the case whose turn it is."""
    private, secret = CASES[run % len(CASES)], simulated_secret(run, "bench")
    if private.unit == "record":
        draws = (HalvedDraws if halved else RecordDraws)(secret, "bench", 1)
        return check_record_noise(private, draws, ROWS, BATCH, STEPS, run, DELTA)
    return check_client_noise(private, (HalvedNoise if halved else SecretNoise)(secret, ("bench",)), run, DELTA)


def count_alarms(done: list[NoiseCheck], halved: bool) -> int:
    """Print what was found; how many estimates contradict what was accounted."""
    alarms = sum(one.shown.contradicts(one.accounted) for one in done)
    above = sum(one.shown.estimate > one.accounted for one in done)
    certified = sum(one.shown.certified > one.accounted for one in done)
    ratios = sorted(one.shown.estimate / one.accounted for one in done)
    print(
        f"   {'half of the noise' if halved else 'the declared noise'}: {len(done)} runs, {alarms} alarms; estimate over accounted "
        f"epsilon {ratios[0]:.2f} to {ratios[-1]:.2f}, above it in {above}; certified bound above it in {certified}"
    )
    return alarms
