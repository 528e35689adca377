"""Synthetic customer-support tickets: the demo's data, generated from sentences written for it and free of any licence.

Each client is a company of its own trade. Its customers write about its own things in its own style, with its own share
of typing errors and its own mix of intents. Most tickets mention two topics, and only the wording of the sentence says
which of them the customer wants dealt with, so counting keywords does not solve the task. The sentences are in `tickets.json`.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np

from fedloom.core.errors import Refused
from fedloom.core.seeds import derive, rng
from fedloom.data.examples import Examples, Split

INTENTS = ("access", "billing", "cancel", "fault", "refund", "status")


class Style(NamedTuple):
    """Style of a company's customers; empty strings make an opening or a closing optional."""

    openings: Sequence[str]
    details: Sequence[str]
    closings: Sequence[str]
    lower: bool


class Phrases(NamedTuple):
    """The sentences and nouns that tickets are made of; a word in braces is filled in.

    Fields:
        trades: for each trade its nouns: what it sells (thing), charges (fee), delivers (move), what breaks (part) and what one
            logs in to (gate).
        styles: styles of customers, one a company.
        requests: for each intent the whole request of a ticket with one topic.
        topics: for each intent its topic as a noun: the same nouns serve for the topic that counts and for the one that does not.
        settled: sentences about a topic {past} that nobody needs to act on.
        wanted: sentences about the topic {want} that the ticket is about.
        linked: sentences with both.
        names, months: what {name} and {when} may be.
    """

    trades: Mapping[str, Mapping[str, Sequence[str]]]
    styles: Sequence[Style]
    requests: Mapping[str, Sequence[str]]
    topics: Mapping[str, Sequence[str]]
    settled: Sequence[str]
    wanted: Sequence[str]
    linked: Sequence[str]
    names: Sequence[str]
    months: Sequence[str]


@functools.cache
def phrases() -> Phrases:
    """Return the phrases of `tickets.json`, in the file's order: the draws depend on it."""
    content = json.loads((resources.files("fedloom.data") / "tickets.json").read_text(encoding="utf-8"))
    return Phrases(**{**content, "styles": [Style(**style) for style in content["styles"]]})


@dataclass(frozen=True)
class Tickets:
    """A `Source` of synthetic support tickets; a label is the intent of the ticket's writer.

    Fields:
        clients: companies.
        per_client: training tickets of each company.
        test: test tickets over all, balanced over companies and intents.
        alpha: concentration of the Dirichlet draw of a company's intents; the smaller, the more uneven.
        tangled: share of tickets with two topics.
        noise: the largest share of mistyped words that a company can have.
    """

    clients: int = 8
    per_client: int = 300
    test: int = 480
    alpha: float = 1.0
    tangled: float = 0.6
    noise: float = 0.12

    def __post_init__(self) -> None:
        for field in ("clients", "per_client", "test"):
            if (count := getattr(self, field)) < 1:
                raise Refused(f"data.{field}", count, "choose a whole number of at least 1")
        if not 0 < self.alpha < float("inf"):
            raise Refused("data.alpha", self.alpha, "choose a number above 0")
        for field in ("tangled", "noise"):
            if not 0 <= (share := getattr(self, field)) <= 1:
                raise Refused(f"data.{field}", share, "choose a share from 0 to 1")

    def load(self, seed: int) -> Split:
        """Return the tickets of `seed`; no test ticket has the text of a training ticket."""
        train = [row for client in range(self.clients) for row in self._training(seed, client)]
        seen = {text for text, _, _ in train}
        test = [self._unseen(seed, index, seen) for index in range(self.test)]
        return Split(_examples(train), _examples(test))

    def _training(self, seed: int, client: int) -> list[tuple[str, int, str]]:
        mix = np.random.default_rng(derive(seed, "tickets", client, "mix")).dirichlet([self.alpha] * len(INTENTS))
        draw = rng(seed, "tickets", client, "train")
        labels = draw.choices(range(len(INTENTS)), weights=mix.tolist(), k=self.per_client)
        return [(self._write(draw, client, INTENTS[label], seed), label, _name(client)) for label in labels]

    def _unseen(self, seed: int, index: int, seen: set[str]) -> tuple[str, int, str]:
        client, label = index % self.clients, index // self.clients % len(INTENTS)
        draw = rng(seed, "tickets", "test", index)
        while (text := self._write(draw, client, INTENTS[label], seed)) in seen:
            pass
        return text, label, _name(client)

    def _write(self, draw: random.Random, client: int, intent: str, seed: int) -> str:
        """One ticket of a company with this intent."""
        trade, (style, errors) = list(phrases().trades.values())[client % len(phrases().trades)], _manner(seed, client)
        typos = self.noise * errors
        parts = (draw.choice(style.openings), _body(draw, trade, intent, self.tangled), draw.choice(style.details))
        text = " ".join(part for part in (*parts, draw.choice(style.closings)) if part)
        text = _fill(draw, trade, text)
        text = text.lower() if style.lower else text
        return " ".join(_mistype(draw, word) if draw.random() < typos else word for word in text.split())


@functools.lru_cache(maxsize=1024)
def _manner(seed: int, client: int) -> tuple[Style, float]:
    """The style of a company's customers, and how many typing errors they make, from 0 to 1 of the most."""
    draw, styles = rng(seed, "tickets", client, "style"), phrases().styles
    return styles[(client + draw.randrange(2)) % len(styles)], draw.random()


def _body(draw: random.Random, trade: Mapping[str, Sequence[str]], intent: str, tangled: float) -> str:
    """The part of a ticket that carries its intent."""
    if draw.random() >= tangled:
        body = draw.choice(phrases().requests[intent])
    else:
        other = draw.choice([name for name in INTENTS if name != intent])
        apart = [draw.choice(phrases().settled), draw.choice(phrases().wanted)]
        draw.shuffle(apart)
        frame = draw.choice((" ".join(apart), draw.choice(phrases().linked)))
        want, past = (_fill(draw, trade, draw.choice(phrases().topics[name])) for name in (intent, other))
        body = frame.format(want=want, past=past)
    return re.sub(r"(^|[.?!] )(\w)", lambda match: match[1] + match[2].upper(), _fill(draw, trade, body))


def _fill(draw: random.Random, trade: Mapping[str, Sequence[str]], text: str) -> str:
    """The text with its braces filled; every word is drawn whether the text has a place for it or not."""
    words = {slot: draw.choice(nouns) for slot, nouns in trade.items()}
    words |= {"name": draw.choice(phrases().names), "when": draw.choice(phrases().months)}
    words |= {"ref": str(draw.randrange(10_000, 99_999))}
    words |= {"amount": f"${draw.randrange(8, 400)}.{draw.randrange(100):02}", "year": str(draw.randrange(2005, 2025))}
    return text.format(**words)


def _mistype(draw: random.Random, word: str) -> str:
    """The word with two neighbouring letters swapped, one left out, or one doubled; short words and numbers stay."""
    if len(word) < 4 or not word.strip(".,!?").isalpha():
        return word
    at = draw.randrange(1, len(word) - 2)
    middle = draw.choice((word[at + 1] + word[at], word[at], word[at] * 2 + word[at + 1]))
    return word[:at] + middle + word[at + 2 :]


def _name(client: int) -> str:
    """The trade, numbered from the second company of that trade on."""
    trades = list(phrases().trades)
    earlier, trade = divmod(client, len(trades))
    return trades[trade] + (f"-{earlier + 1}" if earlier else "")


def _examples(rows: list[tuple[str, int, str]]) -> Examples:
    texts, labels, clients = zip(*rows, strict=True)
    return Examples(texts, None, labels, INTENTS, clients)
