"""Customer-support tickets made up on the spot: the demo's data, written here and free of any licence.

Each client is a company of its own trade. Its customers write about its own things in its own style, with its own share
of typing errors and its own mix of intents. Most tickets mention two topics, and only the wording of the sentence says
which of them the customer wants dealt with, so counting keywords does not solve the task.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedloom.core.errors import Refused
from fedloom.core.seeds import derive, rng
from fedloom.data.examples import Examples, Split

INTENTS = ("access", "billing", "cancel", "fault", "refund", "status")


class Trade(NamedTuple):
    """A trade's nouns: what it sells, what it charges, what a customer waits for, what breaks, what one logs in to."""

    thing: tuple[str, ...]
    fee: tuple[str, ...]
    move: tuple[str, ...]
    part: tuple[str, ...]
    gate: tuple[str, ...]


class Style(NamedTuple):
    """How a company's customers write; empty strings make an opening or a closing optional."""

    openings: tuple[str, ...]
    details: tuple[str, ...]
    closings: tuple[str, ...]
    lower: bool = False


TRADES = {
    "bank": Trade(
        ("savings account", "credit card", "joint account", "car loan", "mortgage"),
        ("overdraft fee", "card fee", "foreign exchange charge", "late payment interest"),
        ("transfer to my brother", "mortgage decision", "replacement card", "wire from Canada"),
        ("card reader", "banking app", "contactless chip", "standing order page"),
        ("online banking", "mobile banking", "the secure inbox", "the loan portal"),
    ),
    "clinic": Trade(
        ("physio course", "dental plan", "flu vaccination", "eye surgery", "annual check-up"),
        ("consultation fee", "lab charge", "missed visit fee", "X-ray copayment"),
        ("blood test result", "referral letter", "repeat prescription", "MRI appointment"),
        ("booking page", "hearing aid", "blood pressure monitor", "video consultation"),
        ("the patient portal", "my health record", "the pharmacy page", "my family's records"),
    ),
    "shop": Trade(
        ("winter coat", "coffee machine", "gift card", "pair of running shoes", "sofa"),
        ("shipping cost", "gift wrap fee", "import duty", "express surcharge"),
        ("parcel", "exchange for a larger size", "second half of the order", "pre-order"),
        ("checkout page", "voucher box", "zip on the jacket", "kettle"),
        ("my shop account", "the wish list", "the loyalty page", "guest checkout"),
    ),
    "telecom": Trade(
        ("family plan", "fibre contract", "roaming pass", "phone insurance", "landline"),
        ("roaming charge", "activation fee", "data overage", "line rental"),
        ("new SIM", "number transfer", "engineer visit", "router"),
        ("voicemail", "wifi", "5G signal", "set-top box"),
        ("my selfcare page", "the usage portal", "the TV app", "webmail"),
    ),
    "airline": Trade(
        ("flight to Lisbon", "seat upgrade", "return ticket", "lounge pass", "extra bag"),
        ("baggage fee", "change fee", "fuel surcharge", "seat charge"),
        ("delayed suitcase", "boarding pass", "rebooking", "upgrade decision"),
        ("seat screen", "check-in kiosk", "trip planner", "seat map"),
        ("my miles account", "the booking site", "online check-in", "the lounge app"),
    ),
    "software": Trade(
        ("team licence", "pro plan", "free trial", "storage add-on", "analytics module"),
        ("seat price", "storage overage", "setup fee", "annual renewal fee"),
        ("licence key", "data export", "migration", "feature request"),
        ("sync client", "CSV import", "search bar", "calendar plugin"),
        ("the admin console", "our workspace", "single sign-on", "the developer portal"),
    ),
    "energy": Trade(
        ("gas contract", "green tariff", "boiler cover", "solar lease", "electricity contract"),
        ("standing charge", "unit rate", "estimated bill", "exit fee"),
        ("meter visit", "tariff switch", "boiler repair", "final bill"),
        ("smart meter", "thermostat", "in-home display", "meter reading form"),
        ("my energy account", "the tenant portal", "the usage dashboard", "the landlord login"),
    ),
    "insurance": Trade(
        ("travel policy", "home policy", "pet cover", "car policy", "dental cover"),
        ("excess", "premium", "admin fee", "mid-term adjustment charge"),
        ("claim", "surveyor's report", "policy document", "courtesy car"),
        ("quote calculator", "claim form", "photo upload", "tracker box"),
        ("my policy page", "the claims portal", "the broker site", "the renewal page"),
    ),
}

STYLES = (
    Style(("",), ("", "", "Ref {ref}.", "Second ticket."), ("", "", "Thx.", "Asap."), lower=True),
    Style(
        ("Hello,", "Hello there,", "Good morning,", ""),
        ("I hope I am writing to the right address.", "My reference is {ref}.", "", ""),
        ("Thank you so much for your help!", "Many thanks in advance.", "Thanks, {name}"),
    ),
    Style(
        ("This is ridiculous.", "Unbelievable.", "Third time I'm writing!", "Seriously?", ""),
        ("I've been on hold for an hour.", "Nobody answers the phone.", "", "You had {ref} for weeks!"),
        ("Sort it out!", "Worst service ever.", "I am telling everyone about this.", "Do your job!"),
    ),
    Style(
        ("Dear Sir or Madam,", "To whom it may concern:", "Dear customer service team,"),
        ("I have been a customer since {year}.", "I refer to case {ref}.", ""),
        ("Yours faithfully, {name}", "Kind regards, {name}", "I look forward to your reply."),
    ),
    Style(
        ("Hiya,", "Hey guys,", "Hi team, hope you're having a great week!", "Hey, me again :)"),
        ("My daughter said I should just write to you.", "Busy week here, sorry.", "", "It's raining here again."),
        ("Cheers, {name}", "Have a lovely day!! {name}", "Bye for now :)", "xx {name}"),
    ),
)

# fmt: off
REQUESTS = {  # the whole request of a ticket with one topic
    "access": (
        "I can't get into {gate} since {when}.", "The code I need for {gate} never arrives, so I'm stuck outside.",
        "After I paid the {fee}, {gate} no longer accepts my details.",
        "How do I open {gate} with a new phone? It keeps turning me away.",
        "I changed my email and now I can't see my {thing} in {gate}.",
        "{gate} asks for a password that I never set.", "Too many tries, now {gate} won't let me look at the {move}.",
    ),
    "billing": (
        "Why do I pay {amount} for the {fee}?",
        "The {fee} went up in {when} and nobody told me. How is it worked out?",
        "My statement shows {amount} for the {part}. What is that?",
        "I count two lines for the {thing} this month. Which one is right?",
        "Please send a corrected invoice, the {fee} on it does not match my contract.",
        "Was the {move} supposed to cost {amount}? Your site says it's included.",
        "I want to change the card you take the {thing} money from.",
    ),
    "cancel": (
        "I no longer need the {thing}, please end it by {when}.", "Don't renew my {thing}.",
        "Call off the {move}, I've changed my mind.", "What do I sign to get out of the {thing}?",
        "We are moving away in {when}, so take me off the {thing}.",
        "With the {fee} this high I'm going elsewhere. Close my {thing}.",
        "Please delete me from {gate} for good, I'm leaving.",
    ),
    "fault": (
        "The {part} stopped working in {when}.", "Every time I use the {part} it freezes and I have to start over.",
        "The {part} shows error {ref} when I enter the {fee}.", "{gate} opens fine, but the {part} stays blank.",
        "The {part} doesn't do anything when I pick my {thing}.",
        "Is the {part} down? It was slow and now it is dead.", "Since you sent the {move}, the {part} acts up.",
    ),
    "refund": (
        "Please give me back the {amount} for the {thing}.",
        "I ended the {thing} in {when} and want what I paid returned.",
        "You took the {fee} twice, send one of them back.", "The {part} never worked, so I'd like my {amount} back.",
        "The {move} came far too late, I expect to be compensated.",
        "Reverse the {fee}, I should not have had to pay it.", "Put the {amount} back on my card.",
    ),
    "status": (
        "Any news on the {move}?", "The {move} was promised for {when} and I've heard nothing.",
        "How much longer for the {move}?", "I paid the {fee}, so when does the {move} come?",
        "{gate} still says pending for the {move}. Is that normal?",
        "Did you get the papers for my {thing}? What happens next?",
        "You fixed the {part}, but where is the {move} that was meant to come with it?",
    ),
}

TOPICS = {  # as a noun: the same nouns serve for the topic that counts and for the one that does not
    "access": ("the locked login", "the password for {gate}", "getting into {gate}", "the sign-in code for {gate}"),
    "billing": ("the {fee} on my bill", "the wrong invoice", "the price of the {thing}", "{amount} on my statement"),
    "cancel": ("ending my {thing}", "the cancellation", "leaving the {thing}", "stopping the {thing} renewal"),
    "fault": ("the broken {part}", "the error in the {part}", "the {part} freezing", "the {part} that doesn't work"),
    "refund": ("the refund", "getting my {amount} back", "my money back for the {thing}", "the {fee} repayment"),
    "status": ("the wait for the {move}", "the late {move}", "the arrival of the {move}", "the date of the {move}"),
}

SETTLED = (  # nobody needs to act on {past}
    "You already solved {past}.", "Last month I wrote about {past}.", "I am not asking about {past} this time.",
    "{past} is fine now.", "Forget {past}.", "{past} can wait.", "Your colleague could only talk about {past}.",
    "{past} is my neighbour's problem, not mine.", "Thank you for looking into {past}.",
)
WANTED = (  # {want} is what the ticket is about
    "I need help with {want}.", "My problem today is {want}.", "{want} is urgent.", "This is about {want}.",
    "Nobody has dealt with {want}.", "{want} can't wait.", "I'm still asking for somebody to look at {want}.",
)
LINKED = (  # both in one sentence
    "This is not about {past}, it is about {want}.", "This is about {want}, not about {past}.",
    "You took care of {past} but not of {want}.", "Rather than {past}, please take on {want}.",
    "I had asked about {want} and your reply was about {past}.", "{want} matters more to me than {past}.",
)
# fmt: on

NAMES = ("Sam", "Priya", "J. Keller", "Maria Lopez", "Tom", "A. Okafor", "Wei", "Mrs Dunn", "Lena", "R. Haddad")
MONTHS = ("January", "March", "April", "May", "June", "August", "October", "November", "December")


@dataclass(frozen=True)
class Tickets:
    """A `Source` of tickets: `clients` companies with `per_client` training tickets each, `test` tickets over all.

    A client's intents follow a Dirichlet draw with concentration `alpha`; the test tickets are balanced over clients
    and intents. `tangled` is the share of tickets with two topics, `noise` the largest share of mistyped words that a
    client can have.
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
        """The tickets of `seed`; no test ticket has the text of a training ticket."""
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
        trade = list(TRADES.values())[client % len(TRADES)]
        manner = rng(seed, "tickets", client, "style")
        style, typos = STYLES[(client + manner.randrange(2)) % len(STYLES)], self.noise * manner.random()
        parts = (draw.choice(style.openings), _body(draw, trade, intent, self.tangled), draw.choice(style.details))
        text = " ".join(part for part in (*parts, draw.choice(style.closings)) if part)
        text = _fill(draw, trade, text)
        text = text.lower() if style.lower else text
        return " ".join(_mistype(draw, word) if draw.random() < typos else word for word in text.split())


def _body(draw: random.Random, trade: Trade, intent: str, tangled: float) -> str:
    """The part of a ticket that carries its intent."""
    if draw.random() >= tangled:
        body = draw.choice(REQUESTS[intent])
    else:
        other = draw.choice([name for name in INTENTS if name != intent])
        apart = [draw.choice(SETTLED), draw.choice(WANTED)]
        draw.shuffle(apart)
        frame = draw.choice((" ".join(apart), draw.choice(LINKED)))
        want, past = (_fill(draw, trade, draw.choice(TOPICS[name])) for name in (intent, other))
        body = frame.format(want=want, past=past)
    return re.sub(r"(^|[.?!] )(\w)", lambda found: found[1] + found[2].upper(), _fill(draw, trade, body))


def _fill(draw: random.Random, trade: Trade, text: str) -> str:
    words = {slot: draw.choice(nouns) for slot, nouns in trade._asdict().items()}
    words |= {"name": draw.choice(NAMES), "when": draw.choice(MONTHS), "ref": str(draw.randrange(10_000, 99_999))}
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
    again, trade = divmod(client, len(TRADES))
    return list(TRADES)[trade] + (f"-{again + 1}" if again else "")


def _examples(rows: list[tuple[str, int, str]]) -> Examples:
    texts, labels, clients = zip(*rows, strict=True)
    return Examples(texts, None, labels, INTENTS, clients)
