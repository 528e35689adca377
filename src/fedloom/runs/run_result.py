"""The result of a run, for Python and notebooks: its figures, its clients, and the model to predict, write and export with.

A result is a run folder that is opened. It reads the folder when something is asked for, and loads the model when that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from fedloom.core.errors import Refused, refuse_damaged
from fedloom.core.files import create_folder
from fedloom.core.lora import Adapter
from fedloom.core.text import did_you_mean
from fedloom.data.examples import Examples, Turn
from fedloom.report import facts
from fedloom.report.line_table import Line
from fedloom.report.notebook_view import result_html, result_words
from fedloom.report.page import write_report
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.train.base_model import Base, most_tokens
from fedloom.train.device import AUTO
from fedloom.train.evaluate import generate_answers, label_probabilities
from fedloom.train.export import load_model, open_run, save_adapter, save_merged, truncate_adapter
from fedloom.train.settings import Generation
from fedloom.train.tokenised import LONGEST_BY_DEFAULT, EncodedTexts, encode_texts

Conversation: TypeAlias = Sequence[Mapping[str, str]]
"""Messages {"role": .., "content": ..} in order; the last one is the user's."""
Prompt: TypeAlias = str | tuple[str, str] | Conversation
"""A request, a request with a text that it is about, or a conversation."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Fields:
        folder: the run folder.
        scores: figures of all versions that were scored, in order.
        trained: the final adapter where it is in memory (None: it is read from the folder when it is needed).
    """

    folder: Path
    scores: tuple[Mapping[str, float], ...]
    trained: Adapter | None = field(default=None, repr=False, compare=False)

    @cached_property
    def log(self) -> RunLog:
        """Everything that the run has written, as it was when it was first asked for."""
        return read_run_log(self.folder)

    @cached_property
    def _opened(self) -> tuple[Base, Adapter, tuple[str, ...]]:
        return open_run(self.folder, AUTO)

    @property
    def adapter(self) -> Adapter:
        """The final adapter, with all that was folded into the model. Raises Refused if the run made no version."""
        return self._opened[1] if self.trained is None else self.trained

    @property
    def writes(self) -> bool:
        """Whether the model writes text; else it chooses labels."""
        return facts.generates_text(self.log)

    @property
    def metrics(self) -> Any:
        """A row for each version: its held-out evaluation (`accuracy`, `loss`, ...), `train_loss`, times and bytes.

        A pandas data frame; a list of mappings where pandas is not installed.
        """
        with refuse_damaged("run folder", str(self.folder)):
            return data_frame(list(version_rows(self.log)))

    @property
    def clients(self) -> Any:
        """A row for each client: its device, rank, examples, tasks and bytes, and its held-out evaluation beside the baseline.

        A pandas data frame; a list of mappings where pandas is not installed.
        """
        with refuse_damaged("run folder", str(self.folder)):
            return data_frame(list(client_rows(self.log)))

    @property
    def report(self) -> Path:
        """The report page, `report.html` in the run folder; it is written if it is not there."""
        page = self.folder / "report.html"
        return page if page.is_file() else write_report([self.folder], page)

    def model(self) -> Any:
        """Load the base model with the final adapter, as a `PeftModel`: a new one each time, to be changed as you like."""
        return load_model(self.folder)

    def tokenizer(self) -> Any:
        """Return the tokenizer that the model was trained with."""
        return self._opened[0].tokenizer

    def predict(self, texts: str | Sequence[str] | Sequence[tuple[str, str]]) -> list[str]:
        """Return the likeliest label of each text, or of each pair of texts. Raises Refused for a model that writes text."""
        names = self._opened[2]
        return [names[max(range(len(row)), key=row.__getitem__)] for row in self._probabilities(texts)]

    def predict_proba(self, texts: str | Sequence[str] | Sequence[tuple[str, str]]) -> Any:
        """Return the probability of each label for each text or pair: a row for each, a column for each label.

        A pandas data frame; a list of mappings where pandas is not installed.
        """
        names = self._opened[2]
        return data_frame([dict(zip(names, row, strict=True)) for row in self._probabilities(texts)], names)

    def _probabilities(self, texts: str | Sequence[str] | Sequence[tuple[str, str]]) -> list[list[float]]:
        base, adapter, names = self._opened
        if base.labels is None:
            raise Refused("run folder", str(self.folder), "its model writes text; use generate")
        rows = _text_rows(texts)
        if not rows:
            return []
        pairs = isinstance(rows[0], tuple)
        if pairs != bool(self.log.manifest["run"].get("data", {}).get("pair")):
            learnt, given = ("single texts", "pairs") if pairs else ("pairs (text, text)", "single texts")
            raise Refused("texts", given, f"the model was trained on {learnt}; give these")
        columns: list[Any] = list(zip(*rows, strict=True)) if pairs else [tuple(rows), None]
        examples = Examples(columns[0], columns[1], (0,) * len(rows), names, None)
        found: list[list[float]] = label_probabilities(base, adapter, self._encoded(examples)).tolist()
        return found

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        max_new_tokens: int = Generation().max_new_tokens,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Return an answer to each prompt, in at most so many tokens, always the likeliest next one.

        `on_text` is called with each piece of an answer as it is written; the prompts are then answered one after the other.
        Raises Refused for a model that chooses labels.
        """
        base, adapter, names = self._opened
        if base.labels is not None:
            raise Refused("run folder", str(self.folder), "its model chooses labels; use predict")
        Generation(max_new_tokens=max_new_tokens)
        asked = [_asked(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        if not asked:
            return []
        requests, contexts, histories = zip(*asked, strict=True)
        none = ("",) * len(asked)
        texts = self._encoded(Examples(requests, contexts, (0,) * len(asked), names, None, none, histories))
        return generate_answers(base, adapter, texts, range(len(asked)), max_new_tokens, on_text=on_text)

    def _encoded(self, examples: Examples) -> EncodedTexts:
        """Tokenise texts whole, as far as the model reads them."""
        base: Base = self._opened[0]
        longest = min(LONGEST_BY_DEFAULT, most_tokens(base, LONGEST_BY_DEFAULT))
        return encode_texts(examples, base.tokenizer, longest, self.log.manifest["run"].get("date"))

    def export(
        self,
        out: str | Path | None = None,
        rank: int | None = None,
        client: str | None = None,
        merged: bool = False,
    ) -> Path:
        """Write the adapter for use without fedloom, and return its folder.

        Args:
            out: the folder to write, which must not exist yet (None: one in the run folder, named by what it is).
            rank: write its best approximation at this rank.
            client: write it at the rank of this client.
            merged: merge it into the base model: a plain transformers folder.

        Raises:
            Refused: not exactly one of `rank`, `client` and `merged` is given, or there is no such client or rank.
        """
        if sum([client is not None, rank is not None, merged]) != 1:
            raise Refused("export", str(self.folder), "say exactly one of client, rank, merged")
        if client is not None:
            rank = self._rank_of(client)
        base, adapter, names = open_run(self.folder)
        top = max(factor.rank for factor in adapter.factors.values())
        if rank is not None and not 1 <= rank <= top:
            raise Refused("rank", rank, f"the run's adapter has rank {top}; choose 1 to {top}")
        name = "merged" if merged else f"adapter-{client}" if client else f"adapter-r{rank}"
        place = create_folder(self.folder / name if out is None else Path(out))
        if rank is None:
            return save_merged(base, adapter, names, place)
        date = self.log.manifest["run"].get("date")
        return save_adapter(base, truncate_adapter(adapter, rank), names, place, date)

    def _rank_of(self, client: str) -> int:
        with refuse_damaged("run folder", str(self.folder)):
            ranks = {str(line["client"]): int(line["rank"]) for line in (*self.log.clients, *self.log.unscored)}
        if client not in ranks:
            near = did_you_mean(client, ranks)
            scored = f"the run scored {', '.join(sorted(ranks)) or 'no clients'}"
            raise Refused("client", client, f"{near} {scored}" if near else scored)
        return ranks[client]

    def __repr__(self) -> str:
        try:
            with refuse_damaged("run folder", str(self.folder)):
                return f"RunResult({str(self.folder)!r}: {result_words(self.log)})"
        except (Refused, OSError):  # the folder is gone, or is none; a debugger shows it all the same
            return f"RunResult({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        return result_html(self.log)


def open_result(folder: str | Path) -> RunResult:
    """Open the folder of a run, whatever state it is in, or that of a deployment. Raises Refused where it is none."""
    place = Path(folder)
    if not (place / "manifest.json").is_file() and (place / "run" / "manifest.json").is_file():
        place = place / "run"
    scores = ({k: v for k, v in line.items() if k not in NO_FIGURES} for line in read_run_log(place).scores)
    return RunResult(place, tuple(scores))


NO_FIGURES = ("kind", "version", "time", "base_accuracy")
"""What a line of a score has beside its figures."""


def version_rows(log: RunLog) -> Iterator[Line]:
    """Yield a row for each version that was made or scored; of a line only what is one number."""
    made = {int(line["version"]): line for line in log.versions}
    scored = {int(line["version"]): line for line in log.scores}
    for version in sorted({*made, *scored}):
        line = {"train_loss" if name == "loss" else name: value for name, value in made.get(version, {}).items()}
        row = {"version": version, "time": 0.0, **scored.get(version, {}), **line}
        yield {name: value for name, value in row.items() if isinstance(value, int | float)}


def client_rows(log: RunLog) -> Iterator[Line]:
    """Yield a row for each client, by name."""
    profiles: Mapping[str, Line] = log.manifest["clients"]
    sizes: Mapping[str, Line] = log.manifest["partition"].get("clients", {})
    scored = {str(line["client"]): line for line in (*log.clients, *log.unscored)}
    tasks = log.tasks.by_text("client")
    for client in sorted({*profiles, *sizes, *scored, *tasks}):
        row = {"client": client, "tier": profiles.get(client, {}).get("tier"), "rank": None}
        row |= {name: sizes[client].get(name) for name in ("examples", "held_out") if client in sizes}
        row |= {name: value for name, value in scored.get(client, {}).items() if name not in ("kind", "reason")}
        own = tasks.get(client)
        row |= {"tasks": len(own) if own else 0, "merged": facts.merged_count(own) if own else 0}
        yield row | {name: facts.total_of(own, name) if own else 0.0 for name in ("bytes_up", "bytes_down")}


def data_frame(rows: Sequence[Line], columns: Iterable[str] = ()) -> Any:
    """Return rows as a pandas data frame; as they are where pandas is not installed. `columns` names those of an empty table."""
    if find_spec("pandas") is None:
        return list(rows)
    pandas: Any = import_module("pandas")
    return pandas.DataFrame(list(rows), columns=[*columns] or None)


def _text_rows(texts: Any) -> list[Any]:
    """Return texts or pairs of texts as a list. Raises Refused for anything else, and for both together."""
    if hasattr(texts, "columns"):
        raise Refused("texts", f"a {type(texts).__name__}", 'give one column of it, such as frame["text"]')
    rows = [texts] if isinstance(texts, str) else list(texts)
    pairs = [isinstance(row, tuple) and len(row) == 2 and all(isinstance(part, str) for part in row) for row in rows]
    if not all(pairs) and (any(pairs) or not all(isinstance(row, str) for row in rows)):
        raise Refused("texts", f"a list of {len(rows)}", "give texts only, or pairs (text, text) only")
    return rows


def _asked(prompt: Prompt) -> tuple[str, str, tuple[Turn, ...]]:
    """Return request, context and earlier messages of a prompt. Raises Refused where it is none of its three forms."""
    if isinstance(prompt, str):
        return prompt, "", ()
    given: Any = prompt
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, str) for part in given):
        return given[0], given[1], ()
    try:
        turns = [Turn(message["role"], message["content"]) for message in given]
    except (TypeError, KeyError) as error:
        remedy = 'a prompt is a text, a pair (request, context), or a list of {"role": .., "content": ..}'
        raise Refused("prompts", type(prompt).__name__, remedy) from error
    roles = [turn.role for turn in turns]
    if not roles or roles[-1] != "user" or not {*roles} <= {"system", "user", "assistant"}:
        remedy = "roles are system, user and assistant, and the last message is the user's"
        raise Refused("prompts", ", ".join(map(str, roles)), remedy)
    return turns[-1].content, "", tuple(turns[:-1])
