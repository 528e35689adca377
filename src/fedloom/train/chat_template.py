"""Prompts and answers as tokens, in the model's chat template or a plain one, shortened where they are too long.

The plain template is Alpaca's without its preamble (Taori et al. 2023, "Stanford Alpaca"). A prompt and its answer are tokenised
separately, so that training sees exactly what generation will see: the tokens of the prompt, then those of the answer.

jinja2 is imported for its error class alone: transformers renders chat templates with it and lets its errors through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Turn

Tokens: TypeAlias = tuple[int, ...]

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
    replaced_characters: int = 0


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The form in which one model is prompted, and in which its answers end.

    Fields:
        tokenizer: the model's tokenizer, with or without a chat template.
        start_tokens: tokens with which a plain text begins.
        end_marks: tokens that end an answer; none where the tokenizer has no end mark and no chat template that sets one.
        tokens_after_end: tokens that the chat template writes behind its end mark.
    """

    tokenizer: PreTrainedTokenizerBase
    start_tokens: Tokens = ()
    end_marks: frozenset[int] = frozenset()
    tokens_after_end: int = 0

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """Find the prompt format of this tokenizer's model, by rendering a short example."""
        first, mark = tokenizer.bos_token_id, tokenizer.eos_token_id
        start = (first,) if not tokenizer.chat_template and first in tokenizer("a")["input_ids"][:1] else ()
        form = cls(tokenizer, start, frozenset({mark} - {None}))
        (probe,) = form.tokens([form.answer_text(PromptParts("a"), "a")])
        last = max((place for place, token in enumerate(probe) if token in tokenizer.all_special_ids), default=None)
        if last is None:
            return form
        return replace(form, end_marks=form.end_marks | {probe[last]}, tokens_after_end=len(probe) - 1 - last)

    def prompt_text(self, asked: PromptParts) -> str:
        """Write the prompt as text, up to where the model goes on. Raises Refused if the template does not take the conversation."""
        if self.tokenizer.chat_template:
            return self._render(asked)
        sections = [_section(HEADINGS[turn.role], turn.content) for turn in asked.history]
        sections += [_section("Instruction", asked.request), _section("Input", asked.context) if asked.context else ""]
        return f"{''.join(sections)}### Response:\n"

    def answer_text(self, asked: PromptParts, answer: str) -> str:
        """Write the answer with what the chat template puts around it, its end mark included."""
        if not self.tokenizer.chat_template:
            return answer
        prompt, whole = self._render(asked), self._render(asked, answer)
        return whole.removeprefix(prompt) if whole.startswith(prompt) else answer

    def tokens(self, texts: Iterable[str]) -> list[Tokens]:
        """Tokenise texts, without the special tokens that the tokenizer would add."""
        clean = [_replace_surrogates(text) for text in texts]
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
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
            )
        except TemplateError as error:
            remedy = f"the model's chat template does not take such a conversation ({error}); leave out what it names"
            raise Refused("data.messages", ", ".join(turn.role for turn in turns), remedy) from error


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, asked: PromptParts, room: int) -> Tokens:
    """Tokenise a prompt as in training, up to where the answer begins, in at most `room` tokens."""
    form = PromptFormat.for_tokenizer(tokenizer)
    return form.prompts([form.shorten(asked, room, room)])[0][-room:]


def tokenise_answers(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[tuple[Tokens, ...], tuple[int, ...], FitCounts]:
    """Tokenise each example's prompt and answer in at most `max_length` tokens.

    Where an example is too long, its context and history are shortened before its answer. Its request is kept before the answer, as
    far as half of `max_length`: beyond that the end of a longer answer is cut off, its end mark included.

    Returns:
        The tokens of each example, the position at which each answer begins, and counts of what was changed.
    """
    form, parts, answers = PromptFormat.for_tokenizer(tokenizer), _prompt_parts(examples), examples.answers or ()
    prompts = form.prompts(parts)
    ends = [form.with_end_mark(row) for row in form.tokens(map(form.answer_text, parts, answers))]
    ids, answer_starts, counts = [], [], dict.fromkeys(FIT_NOTES, 0)
    for asked, start, end, answer in zip(parts, prompts, ends, answers, strict=True):
        shortened, room = asked, max_length - min(len(end), max_length // 2)
        if len(start) + len(end) > max_length:
            shortened = form.shorten(asked, max_length - len(end), room)
            (start,) = form.prompts([shortened])
        for name in PromptParts._fields:
            counts[name] += getattr(shortened, name) != getattr(asked, name)
        counts["template"] += len(start) > room
        counts["empty"] += form.end_marks.issuperset(end)
        counts["replaced_characters"] += any(
            text != _replace_surrogates(text) for text in (asked.request, asked.context, answer)
        )
        start = start[-room:]
        counts["answer"] += len(start) + len(end) > max_length
        ids.append((*start, *end[: max_length - len(start)]))
        answer_starts.append(len(start))
    return tuple(ids), tuple(answer_starts), FitCounts(len(parts), **counts)


def fit_notes(
    tokenizer: PreTrainedTokenizerBase, max_length: int, counts_by_use: Mapping[str, FitCounts | None]
) -> list[str]:
    """Write the notes that a reader of the results needs on how examples became tokens; `counts_by_use` by what they are for."""
    limit = f"training.max_length={max_length}"
    counted = [(which, counts) for which, counts in counts_by_use.items() if counts is not None]
    if not counted:
        return []
    lines = [
        f"{getattr(counts, name)} of {counts.examples} {which} examples: {what.format(limit=limit)}."
        for which, counts in counted
        for name, what in FIT_NOTES.items()
        if getattr(counts, name)
    ]
    if not tokenizer.chat_template:
        lines.append(
            "The tokenizer has no chat template: requests are written as ### Instruction, ### Input, ### Response."
        )
    if not PromptFormat.for_tokenizer(tokenizer).end_marks:
        lines.append("The tokenizer has no end mark: answers have none, and what is generated goes on to its limit.")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        lines.append("The tokenizer has no token to pad with: another one fills the batches, and is masked there.")
    return lines


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


def _replace_surrogates(text: str) -> str:
    """Make text that can be tokenised: JSON allows halves of a character (surrogates), Unicode does not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
