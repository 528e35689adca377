"""Prompts and answers as tokens, in the model's chat template or a plain one, shortened where they are too long.

The plain template is Alpaca's without its preamble (Taori et al. 2023, "Stanford Alpaca"). A prompt and its answer are tokenised
separately, so that training sees exactly what generation will see: the tokens of the prompt, then those of the answer. The
assistant's earlier answers are part of the prompt, and are learnt there too, as with `assistant_only_loss` of TRL.

A template may write the date (`strftime_now`). It is given one date instead of today's, so that the same run has the same tokens on
any day.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from itertools import takewhile
from typing import NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

from fedloom.core.errors import Refused
from fedloom.core.text import has_surrogate, without_surrogates
from fedloom.data.examples import Examples, Turn

Tokens: TypeAlias = tuple[int, ...]
Span: TypeAlias = tuple[int, int]
"""First position, and the one after the last."""

DATE = "2026-01-01"
"""The date that chat templates write where a run names none: a fixed one, so that a run is the same on any day."""

CLOCK = "strftime_now"
"""The function of chat templates that formats the present time."""

DIRECTIVES = "aAbBcdDeFgGhHIjklmMpPrRSTuUVwWxXyYzZ"
"""The directives of `strftime` that follow from a date alone."""

DRAWS = re.compile(r"\|\s*random\b|\blipsum\b")
"""What jinja draws at random, from no seed of ours."""

GAP = " ... "
"""Text that replaces the removed middle of a text."""

HEADINGS = {"system": "System", "user": "Instruction", "assistant": "Response"}
"""Headings of the plain template by the role of the speaker."""

FIT_NOTES = {
    "context": "the middle of the context is taken out to fit {limit}",
    "history": "the oldest turns of the conversation are left out to fit {limit}",
    "request": "the middle of the request is taken out to fit {limit}",
    "template": "the beginning of the prompt is cut off to fit {limit}: not even its template fits",
    "answer": "the end of the answer is cut off to fit {limit}; such an answer has no end mark",
    "empty": "the answer has no tokens in this tokenizer",
    "last_only": "only the last answer is learnt: the chat template writes an earlier one differently in later turns",
    "text": "the end of the text is cut off to fit {limit}, of a pair that of the longer one first",
    "text_beginning": "the beginning of the text is cut off to fit {limit}, on the tokenizer's side, of a pair the longer one first",
    "special_tokens": "a text has a special token of the tokenizer in it, such as an end mark, and is read so",
    "replaced_characters": "half characters (lone surrogates) are replaced",
}
"""Sentences on what can happen to an example, by the fields of `FitCounts`."""


class PromptParts(NamedTuple):
    """The parts of a prompt: a request, the context it comes with (empty: none), and the conversation before it."""

    request: str
    context: str = ""
    history: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class FitCounts:
    """Numbers of examples that were changed on the way to tokens, by what happened to them; see `FIT_NOTES`."""

    examples: int
    context: int = 0
    history: int = 0
    request: int = 0
    template: int = 0
    answer: int = 0
    empty: int = 0
    last_only: int = 0
    text: int = 0
    text_beginning: int = 0
    special_tokens: int = 0
    replaced_characters: int = 0

    @property
    def shortened(self) -> bool:
        """Whether any example lost tokens for the sake of a limit."""
        cut = (self.context, self.history, self.request, self.template, self.answer, self.text, self.text_beginning)
        return any(cut)


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The form in which one model is prompted, and in which its answers end.

    Fields:
        tokenizer: the model's tokenizer.
        template: its chat template, with a clock that stands still ("": it has none).
        start_tokens: tokens with which a plain text begins.
        end_marks: tokens that end an answer; none where the tokenizer has no end mark and no chat template that sets one.
        tokens_after_end: tokens that the chat template writes behind its end mark.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = ""
    start_tokens: Tokens = ()
    end_marks: frozenset[int] = frozenset()
    tokens_after_end: int = 0

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> PromptFormat:
        """Find the prompt format of this tokenizer's model on this date (None: `DATE`), by rendering a short example.

        Raises Refused for a chat template that cannot be used.
        """
        first, mark = tokenizer.bos_token_id, tokenizer.eos_token_id
        template = chat_template_of(tokenizer)
        start = (first,) if not template and first in tokenizer("a")["input_ids"][:1] else ()
        form = cls(tokenizer, _with_fixed_clock(template, date or DATE), start, frozenset({mark} - {None}))
        if template:
            form.check_template()
        (probe,) = form.tokens([form.answer_text(PromptParts("a"), "a")])
        last = max((place for place, token in enumerate(probe) if token in tokenizer.all_special_ids), default=None)
        if last is None:
            return form
        return replace(form, end_marks=form.end_marks | {probe[last]}, tokens_after_end=len(probe) - 1 - last)

    def check_template(self) -> None:
        """Raise Refused if the chat template does not take a plain request and its answer, or leaves one of them out."""
        asked, answer = PromptParts("7531"), "8642"
        try:
            wanted = {
                "request": asked.request in self.prompt_text(asked),
                "answer": answer in self.answer_text(asked, answer),
            }
        except Refused as error:
            fault = f"does not take a plain request and its answer ({error.__cause__})"
        else:
            fault = "leaves out the " + " and the ".join(part for part, there in wanted.items() if not there)
            if all(wanted.values()):
                return
        remedy = (
            f"its chat template {fault}; give it another one, or none: then requests are written as ### Instruction"
        )
        raise Refused("model", self.tokenizer.name_or_path, remedy)

    def prompt_text(self, asked: PromptParts) -> str:
        """Write the prompt as text, up to where the model goes on. Raises Refused if the template does not take the conversation."""
        if self.template:
            return self._render(asked)
        mark = self.tokenizer.eos_token or ""
        ends = {"assistant": mark if isinstance(mark, str) else ""}
        sections = [_section(HEADINGS[turn.role], turn.content + ends.get(turn.role, "")) for turn in asked.history]
        sections += [_section("Instruction", asked.request), _section("Input", asked.context) if asked.context else ""]
        return f"{''.join(sections)}### Response:\n"

    def answer_text(self, asked: PromptParts, answer: str) -> str:
        """Write the answer with what the chat template puts around it, its end mark included."""
        if not self.template:
            return answer
        prompt, whole = self._render(asked), self._render(asked, answer)
        return whole.removeprefix(prompt) if whole.startswith(prompt) else answer

    def tokens(self, texts: Iterable[str]) -> list[Tokens]:
        """Tokenise texts, without the special tokens that the tokenizer would add."""
        clean = [without_surrogates(text) for text in texts]
        if not clean:  # the libraries do not take an empty list
            return []
        rows = self.tokenizer(clean, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(row) for row in rows["input_ids"]]

    def prompts(self, asked: Sequence[PromptParts]) -> list[Tokens]:
        """Tokenise prompts."""
        return [(*self.start_tokens, *row) for row in self.tokens(map(self.prompt_text, asked))]

    def with_end_mark(self, answer: Tokens) -> Tokens:
        """Cut an answer after its end mark; where it lacks one, add the tokenizer's, if there is one."""
        last = len(answer) - 1 - self.tokens_after_end
        if last >= 0 and answer[last] in self.end_marks:
            return answer[: last + 1]
        mark = self.tokenizer.eos_token_id
        return answer if mark is None else (*answer, mark)

    def earlier_answers(self, asked: PromptParts, prompt: Tokens) -> tuple[Span, ...] | None:
        """Find the assistant's earlier answers among the tokens of a prompt, each with its end mark.

        An answer begins where the tokens of its own prompt end. None if the template writes one differently here than it would as
        the last answer (some leave out what the model thought): then generation would not see what was learnt.
        """
        if not asked.history:
            return ()
        text, spans = self.prompt_text(asked), list[Span]()
        for place, turn in enumerate(asked.history):
            if turn.role != "assistant" or not place or asked.history[place - 1].role != "user":
                continue
            then = PromptParts(asked.history[place - 1].content, "", asked.history[: place - 1])
            before, written = self.prompt_text(then), self.answer_text(then, turn.content)
            said = written.find(turn.content.strip())
            least = len(written) if said < 0 else said + len(turn.content.strip())
            if not text.startswith(before + written[:least]):
                return None
            start, end = ([*self.start_tokens, *row] for row in self.tokens([before, before + written]))
            begin = _common_length(start, prompt)
            marked = self.with_end_mark(tuple(end[begin:]))
            spans.append((begin, begin + _common_length(marked, prompt[begin:])))
        return tuple(spans)

    def shorten(self, asked: PromptParts, wish: int, room: int) -> PromptParts:
        """Shorten a prompt that should have at most `wish` tokens and must not have more than `room`.

        The middle of the context is removed first, then turns of the history, the oldest first. The middle of the request itself is
        removed only as far as `room` demands.
        """
        asked = self._shorten(asked, asked.context, lambda text: asked._replace(context=text), wish)
        while asked.history and self._size(asked) > wish:
            asked = asked._replace(history=_without_oldest_turns(asked.history))
        return self._shorten(asked, asked.request, lambda text: asked._replace(request=text), room)

    def _shorten(self, asked: PromptParts, text: str, put: Callable[[str], PromptParts], room: int) -> PromptParts:
        """Keep as much of `text` as there is room for, found by doubling and halving; nothing if even that is too much."""
        if self._size(asked) <= room:
            return asked
        fits, most = 0, len(text)
        while most - fits > 1:
            middle = min((fits + most) // 2, max(2 * fits, room, 1))  # long texts are not tokenised in halves first
            fits, most = (middle, most) if self._size(put(_without_middle(text, middle))) <= room else (fits, middle)
        return put(_without_middle(text, fits))

    def _size(self, asked: PromptParts) -> int:
        return len(self.prompts([asked])[0])

    def _render(self, asked: PromptParts, answer: str | None = None) -> str:
        """Apply the chat template, up to where the answer begins or, with an answer, to its end."""
        request = f"{asked.request}\n\n{asked.context}" if asked.context else asked.request
        turns = [*asked.history, Turn("user", request), *([] if answer is None else [Turn("assistant", answer)])]
        messages = [turn._asdict() for turn in turns]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=answer is None
                )
            )
        except Exception as error:  # a template is code of its author
            remedy = f"the model's chat template does not take such a conversation ({error}); leave out what it names"
            raise Refused("data.messages", ", ".join(turn.role for turn in turns), remedy) from error


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, asked: PromptParts, room: int, date: str | None = None) -> Tokens:
    """Tokenise a prompt as in training, up to where the answer begins, in at most `room` tokens."""
    form = PromptFormat.for_tokenizer(tokenizer, date)
    return form.prompts([form.shorten(asked, room, room)])[0][-room:]


class TokenisedAnswers(NamedTuple):
    """Prompts with their answers as tokens.

    Fields:
        ids: the tokens of each example.
        starts: the position at which each answer begins.
        earlier: where earlier answers of the same conversation stand in each.
        counts: numbers of examples that were changed.
    """

    ids: tuple[Tokens, ...]
    starts: tuple[int, ...]
    earlier: tuple[tuple[Span, ...], ...]
    counts: FitCounts


def tokenise_answers(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, date: str | None = None
) -> TokenisedAnswers:
    """Tokenise each example's prompt and answer in at most `max_length` tokens, on this date (None: `DATE`).

    Where an example is too long, its context and history are shortened before its answer. Its request is kept before the answer, as
    far as half of `max_length`: beyond that the end of a longer answer is cut off, its end mark included.
    """
    form, parts = PromptFormat.for_tokenizer(tokenizer, date), _prompt_parts(examples)
    answers, special = examples.answers or (), special_token_pattern(tokenizer)
    prompts = form.prompts(parts)
    ends = [form.with_end_mark(row) for row in form.tokens(map(form.answer_text, parts, answers))]
    ids, answer_starts, earlier, counts = [], [], list[tuple[Span, ...]](), dict.fromkeys(FIT_NOTES, 0)
    for asked, start, end, answer in zip(parts, prompts, ends, answers, strict=True):
        shortened, room = asked, max_length - min(len(end), max_length // 2)
        if len(start) + len(end) > max_length:
            shortened = form.shorten(asked, max_length - len(end), room)
            (start,) = form.prompts([shortened])
        for name in PromptParts._fields:
            counts[name] += getattr(shortened, name) != getattr(asked, name)
        counts["template"] += len(start) > room
        counts["empty"] += form.end_marks.issuperset(end)
        texts = (asked.request, asked.context, answer, *(turn.content for turn in asked.history))
        counts["replaced_characters"] += any(map(has_surrogate, texts))
        counts["special_tokens"] += any(map(special.search, texts))
        spans = form.earlier_answers(shortened, start)
        counts["last_only"] += spans is None
        earlier.append(spans if spans and len(start) <= room else ())
        start = start[-room:]
        counts["answer"] += len(start) + len(end) > max_length
        ids.append((*start, *end[: max_length - len(start)]))
        answer_starts.append(len(start))
    return TokenisedAnswers(tuple(ids), tuple(answer_starts), tuple(earlier), FitCounts(len(parts), **counts))


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds the special tokens of a tokenizer in a text: it reads them there as it reads its own."""
    return re.compile("|".join(map(re.escape, filter(None, tokenizer.all_special_tokens))) or "(?!)")


def fit_notes(max_length: int, counts_by_use: Mapping[str, FitCounts | None]) -> list[str]:
    """Write the notes that a reader of the results needs on how examples became tokens; `counts_by_use` by what they are for."""
    limit = f"training.max_length={max_length}"
    return [
        f"{getattr(counts, name)} of {counts.examples} {which} examples: {what.format(limit=limit)}."
        for which, counts in counts_by_use.items()
        if counts is not None
        for name, what in FIT_NOTES.items()
        if getattr(counts, name)
    ]


def prompt_notes(tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> list[str]:
    """Write the notes that a reader of the results needs on the form of prompts and answers."""
    lines = []
    if writes_date(tokenizer):
        lines.append(f"The chat template writes the date: it is given {date or DATE} (`date` of the run) on any day.")
    if not tokenizer.chat_template:
        lines.append(
            "The tokenizer has no chat template: requests are written as ### Instruction, ### Input, ### Response."
        )
    form = PromptFormat.for_tokenizer(tokenizer, date)
    before = form.answer_text(PromptParts("a"), "8642").partition("8642")[0].strip()
    if before:
        lines.append(
            f"The chat template writes {before!r:.60} before an answer, not in the prompt: the model learns to write it, too."
        )
    if not form.end_marks:
        lines.append("The tokenizer has no end mark: answers have none, and generation stops at its limit only.")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        lines.append("The tokenizer has no padding token: another token pads the batches, and is masked.")
    return lines


# The chat template ------------------------------------------------------------------------------------------------------


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template of a tokenizer, its default one where there are several; "" where there is none. Raises Refused."""
    if not tokenizer.chat_template:
        return ""
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:  # several, and none of them is the default
        remedy = f"none of its chat templates is the default ({', '.join(tokenizer.chat_template)}); leave one"
        raise Refused("model", tokenizer.name_or_path, remedy) from error
    if DRAWS.search(template):
        remedy = "its chat template draws at random, so the same run would give other prompts each time; give it another template"
        raise Refused("model", tokenizer.name_or_path, remedy)
    return template


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template of a tokenizer reads the clock."""
    return CLOCK in chat_template_of(tokenizer)


@cache
def _with_fixed_clock(template: str, date: str) -> str:
    """Put a clock that stands still before a chat template that reads one.

    transformers hands no functions to a template, so it is a macro of jinja: it replaces each directive by its value on that day.
    """
    if CLOCK not in template:
        return template
    day = datetime.fromisoformat(date)
    directives = [f"%{dash}{letter}" for dash in ("", "-") for letter in DIRECTIVES]
    values = [[directive, day.strftime(directive)] for directive in directives]
    return (
        f"{{% macro {CLOCK}(format) %}}{{% for text in format.split('%%') %}}{{{{ '' if loop.first else '%' }}}}"
        f"{{% set now = namespace(text=text) %}}{{% for directive, value in {values} %}}"
        "{% set now.text = now.text | replace(directive, value) %}{% endfor %}{{ now.text }}{% endfor %}{% endmacro +%}"
        f"{template}"
    )


def _prompt_parts(examples: Examples) -> list[PromptParts]:
    contexts = examples.pairs or ("",) * len(examples)
    return [*map(PromptParts, examples.texts, contexts, examples.before or ((),) * len(examples))]


def _section(heading: str, text: str) -> str:
    return f"### {heading}:\n{text}\n\n"


def _without_middle(text: str, length: int) -> str:
    """Keep `length` characters of the two ends of a text."""
    return f"{text[: (length + 1) // 2]}{GAP}{text[len(text) - length // 2 :]}" if length else ""


def _without_oldest_turns(history: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Drop the oldest turns, so that a user's comes first again; the system prompt is dropped last."""
    system = tuple(turn for turn in history if turn.role == "system")
    turns = tuple(turn for turn in history if turn.role != "system")
    if not turns:
        return ()
    first = next((place for place, turn in enumerate(turns) if place and turn.role == "user"), len(turns))
    return (*system, *turns[first:])


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
