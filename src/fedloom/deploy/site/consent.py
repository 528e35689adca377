"""Consent of a site's owner: the terms of a run as one document with a hash, which is shown, accepted and pinned.

The document is the `RunTerms` that a server sends with every request, as JSON with sorted keys; its sha256 names it. The worker obeys
a request only if the document of its terms was accepted. What a server offers is kept in `state/terms/HASH.bin`, where the owner sees
it (`fedloom join`, `fedloom site terms`); an acceptance is a file beside it, `HASH.json`, with the time and who accepted. The worker
itself accepts nothing: the owner does, or a hash in `site.toml` on a machine without a person. A document that differs in anything is
another one and has to be accepted by itself.

What an acceptance does not do: it binds the server to its words, it does not make them harmless (docs/site.md).
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.files import atomic_write, private_folder, read_json, read_regular, write_json
from fedloom.core.schema import Malformed, jsonable
from fedloom.core.text import printable
from fedloom.deploy.messages.messages import JoinRequest, RunTerms, decode_request, encode_request
from fedloom.deploy.site.limits import SiteLimits, refusals, requested
from fedloom.privacy.private import Private

FOLDER = "terms"
"""In the state folder of a site: the documents that were offered and accepted."""
MOST_OFFERED = 16
"""Documents that wait for acceptance; where more are offered, the oldest are forgotten."""
LARGEST = 2**24
"""Bytes of a document."""
SHORT = 12
"""Hex digits by which a document is called in sentences, and the fewest by which it can be named."""
WIDTH = 80
"""Columns in which terms are shown."""


def terms_hash(terms: RunTerms) -> str:
    """Return the sha256 of the document of these terms, 64 hex digits."""
    text = json.dumps(jsonable(terms), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class OfferedTerms:
    """A document that a server offered.

    Fields:
        hash: its sha256.
        terms: the terms.
        offered: when it was offered last (s since 1970).
        accepted: when it was accepted, in UTC ("": it waits).
        by: who accepted it, in words.
    """

    hash: str
    terms: RunTerms
    offered: float
    accepted: str = ""
    by: str = ""


@dataclass(frozen=True, slots=True)
class Consents:
    """The documents of a site.

    Fields:
        state: state folder of the site.
        given: hashes that its settings accept.
    """

    state: Path
    given: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the documents are kept."""
        return self.state / FOLDER

    def why_not(self, terms: RunTerms) -> str:
        """Return why nothing is done under these terms, and keep them for the owner to see; "" if they were accepted.

        Raises Malformed for a document that is too large to be kept.
        """
        name = terms_hash(terms)
        accepted = name in self.given or self._marked(name)
        if not accepted or not (self.folder / f"{name}.bin").exists():
            self._keep(name, terms)
        if accepted:
            return ""
        changed = sorted({line.partition(":")[0] for line in self.changes(terms)})
        more = f"; what was accepted for this run differs in {', '.join(changed)}" if changed else ""
        return f"its owner has not accepted the terms {name[:SHORT]} yet{more}"

    def accept(self, name: str, by: str) -> OfferedTerms:
        """Accept the document with this hash, or with the only hash that begins so (at least 12 digits). Raises Refused."""
        found = [one for one in self.documents() if len(name) >= SHORT and one.hash.startswith(name)]
        if len(found) != 1:
            what = (
                "several documents begin so; give all 64 digits" if found else "no server has offered such a document"
            )
            raise Refused("HASH", name, f"{what}; `fedloom site terms` lists them")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.folder / f"{found[0].hash}.json", {"accepted": now, "by": by})
        return self._read(found[0].hash) or found[0]

    def documents(self) -> list[OfferedTerms]:
        """Return all documents that can be read, the youngest first."""
        found = [self._read(path.stem) for path in self.folder.glob("*.bin")] if self.folder.is_dir() else []
        return sorted((one for one in found if one is not None), key=lambda one: (-one.offered, one.hash))

    def stamps(self) -> tuple[int, ...]:
        """Return when the files of the documents were written (ns), to see cheaply whether anything is new."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return tuple(sorted(path.lstat().st_mtime_ns for path in found))

    def changes(self, terms: RunTerms) -> list[str]:
        """Return what differs from the document that was accepted last for the same run, as "field: old -> new"."""
        name = terms_hash(terms)
        before = [
            one
            for one in self.documents()
            if one.accepted and one.hash != name and one.terms.run_hash == terms.run_hash
        ]
        return [*_differences(max(before, key=lambda one: one.accepted).terms, terms)] if before else []

    def _keep(self, name: str, terms: RunTerms) -> None:
        data = encode_request(JoinRequest(terms, 0))
        decode_request(data, LARGEST)  # what cannot be read again would neither be shown nor forgotten
        private_folder(self.folder)
        with atomic_write(self.folder / f"{name}.bin") as draft:
            draft.write_bytes(data)
        waiting = [one for one in self.documents() if not one.accepted and one.hash != name]
        for one in waiting[MOST_OFFERED - 1 :]:
            (self.folder / f"{one.hash}.bin").unlink(missing_ok=True)

    def _marked(self, name: str) -> bool:
        return (self.folder / f"{name}.json").is_file()

    def _read(self, name: str) -> OfferedTerms | None:
        """Return a document; None for a file that is none, or that has another hash than its name."""
        path = self.folder / f"{name}.bin"
        try:
            terms = decode_request(read_regular(path, LARGEST), LARGEST).terms
            mark = read_json(self.folder / f"{name}.json") if self._marked(name) else {}
            offered = path.stat().st_mtime
        except (OSError, Refused, Malformed):
            return None
        if terms_hash(terms) != name:
            return None
        if not mark and name in self.given:
            mark = {"accepted": "by its hash", "by": "site.toml"}
        return OfferedTerms(name, terms, offered, str(mark.get("accepted", "")), str(mark.get("by", "")))


def _differences(old: RunTerms, new: RunTerms) -> Iterator[str]:
    before, after = dict(_flat(jsonable(old))), dict(_flat(jsonable(new)))
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) != after.get(name):
            yield printable(f"{name}: {before.get(name)} -> {after.get(name)}", lines=False)


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the fields of JSON data with their paths."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}".lstrip("."))
    else:
        yield path, value


# In plain words -------------------------------------------------------------------------------------------------------


def terms_lines(terms: RunTerms, limits: SiteLimits, changes: list[str] | None = None) -> list[str]:
    """Return the document in plain words, at most 80 columns wide, beside the limits of the site, and what it means.

    Args:
        terms: the terms.
        limits: the site's limits.
        changes: what differs from the accepted ones of the same run.
    """
    lines = [f"Terms {terms_hash(terms)}", ""]
    for name, value, limit in [("", "what the server asks", "this site's limit"), *_rows(terms, limits)]:
        lines += _row(name, value, limit)
    lines += ["", *_wrapped("What this means:")]
    for sentence in _meaning(terms):
        lines += _wrapped(sentence, "- ")
    if refused := [*refusals(limits, requested(JoinRequest(terms, 0)))]:
        lines += ["", "The limits of this site refuse it all the same:"]
        lines += [line for reason in refused for line in _wrapped(reason, "- ")]
    if changes:
        lines += ["", "Changed since the terms of this run that were accepted:"]
        lines += [line for change in changes for line in _wrapped(change, "- ")]
    return lines


def _row(name: str, value: str, limit: str) -> list[str]:
    """Return a row of three columns of 18, 37 and 24 characters."""
    cells = [textwrap.wrap(printable(text, lines=False), width) or [""] for text, width in ((value, 36), (limit, 24))]
    height = max(map(len, cells))
    left, right = ([*cell, *[""] * (height - len(cell))] for cell in cells)
    return [f"{name if k == 0 else '':18s}{left[k]:37s}{right[k]}".rstrip() for k in range(height)]


def _wrapped(text: str, mark: str = "") -> list[str]:
    return textwrap.wrap(printable(text, lines=False), WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark))


def _rows(terms: RunTerms, limits: SiteLimits) -> Iterator[tuple[str, str, str]]:
    """Yield (what, what the server asks, what the site allows)."""
    training, lora, engine = terms.training, terms.lora, terms.engine
    rows = terms.steps * training.batch_size
    layers = lora.target_modules or "the usual ones of this model"
    length = training.max_length or "the longest"
    yield "run", f"{terms.run} ({terms.run_hash})", "any" if "*" in limits.runs else " or ".join(limits.runs)
    yield "base model", f"{terms.model}, weights {terms.weights or 'not said'}", "its own copy"
    yield "answers", "text" if terms.labels is None else f"labels {', '.join(terms.labels)}", ""
    yield "layers", layers if isinstance(layers, str) else ", ".join(layers), ", ".join(limits.layers or ("all",))
    yield "rank", f"at most {terms.rank}", f"{limits.rank}"
    yield "depth", f"at most {terms.depth} layers" if terms.depth else "all layers", f"{limits.depth or 'all'}"
    own = "its own" if training.has_base_dropout(None if terms.labels is None else len(terms.labels)) else "none"
    yield (
        "scaling",
        f"{lora.scaling:g}, dropout {lora.dropout:g}, in the base {own}",
        f"{limits.least_scaling:g} to {limits.scaling:g}, dropout {limits.dropout:g}",
    )
    decay = getattr(training.decay, "__name__", "?")
    rates = f"AdamW, learning rate {training.learning_rate:g} ({decay}), warm-up {training.warmup:g}"
    yield (
        "optimiser",
        f"{rates}, weight decay {training.weight_decay:g}",
        f"{limits.least_learning_rate:g} to {limits.learning_rate:g}, weight decay {limits.weight_decay:g}",
    )
    if (rule := terms.rates) is not None:
        yield "rate at rank r", f"times ({rule.reference} / r) ** {rule.power:g}", "as above, at each task's rank"
    yield "clip", f"{training.clip:g}", f"{limits.least_clip:g} to {limits.clip:g}"
    yield "pull", f"{training.proximal:g}", f"{limits.proximal:g}"
    yield "batch", f"{training.batch_size} rows", f"{limits.least_batch} to {limits.batch}"
    yield "steps of a task", f"at most {terms.steps:,}", f"{limits.least_steps} to {limits.steps:,}"
    yield (
        "rows of a task",
        f"at most {rows:,} ({terms.steps:,} x {training.batch_size})",
        f"at least {limits.least_rows}",
    )
    yield "epochs of a task", f"{rows:,} / the rows trained on", f"{limits.epochs:g}; {limits.total_epochs:g} in a run"
    yield "length", f"{length} tokens", f"{limits.least_length} to {limits.length}"
    yield "held out", f"{terms.held_out:g} of the rows", f"{limits.held_out:g}"
    yield "scored", _scored_words(terms), _scored_limit(limits)
    yield "base changed", "yes" if terms.folds else "no", "allowed" if limits.folds else "no"
    yield (
        "gradients",
        "the server adds to them" if terms.controls else "as they are",
        "allowed" if limits.controls else "no",
    )
    yield (
        "until",
        f"version {terms.versions:,}" if terms.versions else "not said",
        f"{limits.tasks_a_day:,} tasks a day",
    )
    yield (
        "computed with",
        f"{terms.threads} threads, {engine.kernel}",
        f"{limits.threads} threads, {limits.seconds:g} s a task",
    )
    yield "other", f"seed {terms.seed}, date {terms.date or 'none'}", ""
    sums = f"over at least {terms.least_sum} sites, {terms.sum_threshold:.0%} of whom agree"
    seen = sums if terms.least_sum else "no: the server sees each answer"
    yield (
        "answers are summed",
        seen,
        f"over at least {limits.least_sum} sites" if limits.least_sum > 1 else "may be seen",
    )
    yield "noise in training", _noise_words(terms.records), "at least that of [privacy]"
    yield "privacy", terms.privacy or "nothing is promised", "see docs/site.md"


def _noise_words(records: Private | None) -> str:
    if records is None:
        return "none"
    said = f"{records.multiplier:g} x a clip of {records.clip:g} in each step, at most {records.most_answers:,} tasks"
    return f"{said}, epsilon {records.budget[0]:g} at delta {records.budget[1]:g}" if records.budget else said


def _scored_words(terms: RunTerms) -> str:
    if not terms.held_out or not terms.evaluations:
        return "not at the site"
    return f"{terms.evaluations} x at the end, on what is held out"


def _scored_limit(limits: SiteLimits) -> str:
    if not limits.scores:
        return "no scores"
    sums = "counts and sums of losses" if limits.losses else "counts"
    return f"{limits.evaluations} x, {limits.least_scored} rows, {sums}"


def _meaning(terms: RunTerms) -> Iterator[str]:
    """Yield what follows from the terms, for a reader who does not train models."""
    if terms.least_sum:
        yield "After each task the site masks what it trained. The server sees sums over sites, and how many rows each has."
        yield "This hides single sites only if the keys in the folder `peers` are those of the others: ask their owners."
    else:
        yield "After each task the site sends back the adapter that it trained, and how many rows it has. The server sees it."
    if terms.records is None:
        yield "Rows do not leave. Rare words in them, and whether a known sentence is among them, can be inferred (docs/leakage.md)."
    else:
        yield "Rows do not leave. Each step trains on rows drawn by secret coins, and noise is added here, before anything leaves."
        yield "It bounds what anybody, the server too, learns of any one row, by an epsilon that this site adds up (docs/privacy.md)."
        yield "What many rows have in common is learnt all the same, and how many rows there are is told."
        if terms.records.budget is None:
            yield "The run names no largest epsilon, which small noise makes large: [privacy] epsilon of this site limits it."
    if terms.labels is not None:
        yield "The share of each label among the rows can be inferred from every answer."
    if terms.held_out and terms.evaluations:
        yield "Some rows are kept from training. How many of them the last version gets right is told to the server."
    if terms.folds or terms.controls:
        yield "The server decides more than usual of what is computed here. This makes it easier to learn rows."
    if terms.privacy:
        yield f"The server says of privacy: {terms.privacy}. The site cannot check what the server does."
    else:
        yield "The server promises no noise" + ("." if terms.least_sum else " and no hiding of single answers.")
    yield "Accepting holds for exactly this document. Any change of it is offered anew."
