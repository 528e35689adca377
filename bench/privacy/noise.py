"""What is left of a version's noise after the best that a reader of the run folder can take off.

A tiny private run with a secret of its own makes one version (a deployment has one; that of a simulation follows from the seed). The
same run with hardly any noise tells the clean one, so the noise is known here. Three ways to take it off:

- every secret that the folder could tell: each number of 32 bytes in it, its digest, what a simulation would make of the seed, no
  secret at all; with each the noise is made as the server makes it, and subtracted. With the true secret nothing is left, which shows
  that the attempt is the right one;
- the mean over restarts: the run is carried out again and again, and its releases are averaged;
- the noise of another clean value (clients that learn a little faster), which the reader knows, in place of this one's.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.privacy.kills import releases_in, steps_of
from fedloom import FFA, Limits, Private, Rounds, Training
from fedloom.core.lora import named_tensors
from fedloom.core.seeds import simulated_secret
from fedloom.data.partition import hold_out
from fedloom.privacy.secret_noise import SecretNoise
from fedloom.runs.prepare import assemble
from fedloom.runs.private_run import SIMULATED_SERVER
from fedloom.schedule.shared.weights import uniform
from tests.support.tiny_models import settle, tiny_encoder, tiny_run

SECRET = hashlib.sha256(b"a secret that no run folder tells").digest()
CLIP, MULTIPLIER, COHORT = 0.5, 1.0, 4
SILENT = 1e-9
"""Noise multiplier of the run that tells the clean version."""


def figures(quick: bool) -> Mapping[str, object]:
    """The least that is left over the noise, of all attempts; and what is left with the true secret."""
    settle()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_encoder(folder / "model")
        carry = partial(carry_out, model, folder)
        like = carry("clean", SILENT)
        clean, restarts = flat(like), range(2 if quick else 8)
        noise = [flat(carry(f"noisy-{number}", MULTIPLIER)) - clean for number in restarts]
        other = flat(carry("other", MULTIPLIER, 1.01e-2)) - flat(carry("other-clean", SILENT, 1.01e-2))
        made = partial(made_with, like, folder / "noisy-0")
        guesses = [noise[0] - made(secret) for secret in secrets_in(folder / "noisy-0")]
        attempts = {
            f"the best of {len(guesses)} secrets from the folder": min(map(left, guesses)),
            f"the mean over {len(noise)} restarts": left(torch.stack(noise).mean(0)),
            "the noise of another value": left(noise[0] - other),
        }
        known = left(noise[0] - made(SECRET))
    size = left(noise[0])
    shares = {name: found / size for name, found in attempts.items()} | {"the true secret": known / size}
    for name, share in shares.items():
        print(f"   {share:.6f} of the noise is left: {name}", flush=True)
    assert shares["the true secret"] < 1e-4, "the attempt is not how the server makes its noise, so it shows nothing"
    return {"noise_left": min(found / size for found in attempts.values()), "left_with_the_secret": known / size}


def carry_out(
    model: Path, folder: Path, name: str, multiplier: float, learning_rate: float = 1e-2
) -> Mapping[str, Tensor]:
    """Make one version in a folder of this name; what clients trained of it."""
    run: Any = tiny_run(
        model,
        aggregator=FFA(),
        schedule=Rounds(cohort_size=COHORT, weigh=uniform),
        privacy=Private(clip=CLIP, multiplier=multiplier, most_answers=1),
        training=Training(learning_rate=learning_rate),
        limits=Limits(versions=1),
    )
    split, secret_of = run.data.load(run.seed), partial(simulated_secret, run.seed)
    shards = hold_out(run.partition.split(split.train, run.seed), split.train, run.held_out, secret_of)
    adapter = assemble(run, split, shards, None, secret=SECRET).execute(folder / name, report=False).adapter
    return {key: one for key, one in named_tensors(adapter).items() if not key.endswith(".down")}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All numbers in one row, in order of name."""
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(tensors.items())])


def left(noise: Tensor) -> float:
    """Root of the mean square."""
    return float(noise.square().mean().sqrt())


def secrets_in(folder: Path) -> Iterator[bytes]:
    """Secrets that a reader of the run folder could try."""
    yield from (b"", bytes(32), *(simulated_secret(seed, SIMULATED_SERVER) for seed in range(100)))
    texts = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {bytes.fromhex(one.decode()) for text in texts.values() for one in re.findall(rb"[0-9a-f]{64}", text)}
    found |= {hashlib.sha256(text).digest() for text in texts.values()} | {folder.name.encode()}
    yield from sorted(found | {hashlib.sha256(one).digest() for one in found})


def made_with(like: Mapping[str, Tensor], folder: Path, secret: bytes) -> Tensor:
    """The noise that a server with this secret would have added to the version of this folder."""
    (release,) = (one for step in steps_of(folder) for one in releases_in(step["commands"]))
    noise = SecretNoise(secret, ("server noise",))
    drawn = {name: next(noise.normals({name: one}, "noise", release["value"], name)) for name, one in like.items()}
    return MULTIPLIER * CLIP / COHORT * flat(drawn)
