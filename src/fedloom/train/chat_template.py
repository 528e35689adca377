"""Requests and answers as tokens: in the model's chat template or a plain one, and made to fit where they are too long.

The plain template is Alpaca's without its preamble (Taori et al. 2023, "Stanford Alpaca"). A prompt and its answer are tokenised
apart, so that what is trained is what the model will be asked: the tokens of the prompt, then those of the answer.
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
"""What stands where the middle of a text was taken out."""

HEADINGS = {"system": "System", "user": "Instruction", "assistant": "Response"}
"""The headings of the plain template by who speaks."""

FIT_NOTES = {
    "context": "the middle of the context is taken out to fit {limit}",
    "before": "the oldest turns of the conversation are left out to fit {limit}",
    "request": "the middle of the request is taken out to fit {limit}",
    "form": "the beginning of the prompt is cut off to fit {limit}: not even its template fits",
    "answer": "the end of the answer is cut off to fit {limit}; such an answer has no end mark",
    "wordless": "the answer has no tokens in this tokenizer",
    "mended": "half characters (lone surrogates) are replaced",
}
"""What can happen to an example, by the fields of `Fitted`."""


class PromptParts(NamedTuple):
    """A request, the context it comes with (empty: none), and what was said before."""

    request: str
    context: str = ""
    history: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class FitCounts:
    """To how many of the examples something happened on the way to tokens; see `HAPPENED`."""

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
    """How a tokenizer's model is asked, and how it ends what it says.

    `lead` is what a plain text begins with, `ends` the tokens at which an answer ends: none where the tokenizer has no end mark
    and no chat template that sets one. `after` is how many tokens the chat template writes behind its end mark.
    """

    tokenizer: PreTrainedTokenizerBase
    start_tokens: Tokens = ()
    end_marks: frozenset[int] = frozenset()
    tokens_after_end: int = 0

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """The form that this tokenizer's model takes."""
        first, mark = tokenizer.bos_token_id, tokenizer.eos_token_id
        lead = (first,) if not tokenizer.chat_template and first in tokenizer("a")["input_ids"][:1] else ()
        form = cls(tokenizer, lead, frozenset({mark} - {None}))
        (probe,) = form.tokens([form.answer_text(PromptParts("a"), "a")])
        last = max((place for place, token in enumerate(probe) if token in tokenizer.all_special_ids), default=None)
        return form if last is None else replace(form, ends=form.end_marks | {probe[last]}, after=len(probe) - 1 - last)

    def prompt_text(self, asked: PromptParts) -> str:
        """The prompt as text, from where the model goes on. Raises Refused for a conversation that the template does not take."""
        if self.tokenizer.chat_template:
            return self._render(asked)
        sections = [_section(HEADINGS[turn.role], turn.content) for turn in asked.history]
        sections += [_section("Instruction", asked.request), _section("Input", asked.context) if asked.context else ""]
        return f"{''.join(sections)}### Response:\n"

    def answer_text(self, asked: PromptParts, answer: str) -> str:
        """The answer with what the chat template writes around it, its end mark among that."""
        if not self.tokenizer.chat_template:
            return answer
        prompt, whole = self._render(asked), self._render(asked, answer)
        return whole.removeprefix(prompt) if whole.startswith(prompt) else answer

    def tokens(self, texts: Iterable[str]) -> list[Tokens]:
        """Token ids of texts, without marks that the tokenizer would add."""
        clean = [_replace_surrogates(text) for text in texts]
        rows = self.tokenizer(clean, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(row) for row in rows["input_ids"]]

    def prompts(self, asked: Sequence[PromptParts]) -> list[Tokens]:
        """The tokens with which the model is prompted."""
        return [(*self.start_tokens, *row) for row in self.tokens(map(self.prompt_text, asked))]

    def with_end_mark(self, answer: Tokens) -> Tokens:
        """Up to and with its end mark, which is added where it lacks one and the tokenizer has one."""
        last = len(answer) - 1 - self.tokens_after_end
        if last >= 0 and answer[last] in self.end_marks:
            return answer[: last + 1]
        mark = self.tokenizer.eos_token_id
        return answer if mark is None else (*answer, mark)

    def shorten(self, asked: PromptParts, wish: int, room: int) -> PromptParts:
        """What is left of a request whose prompt is to have at most `wish` tokens and must not have more than `room`.

        The middle of the context goes first, then the turns before the request, the oldest first; for `room` alone the middle of the
        request itself.
        """
        asked = self._shorten(asked, asked.context, lambda text: asked._replace(context=text), wish)
        while asked.history and self._size(asked) > wish:
            asked = asked._replace(before=_without_oldest_turns(asked.history))
        return self._shorten(asked, asked.request, lambda text: asked._replace(request=text), room)

    def _shorten(self, asked: PromptParts, text: str, put: Callable[[str], PromptParts], room: int) -> PromptParts:
        """With as much of `text` as there is room for, found by doubling and halving; with nothing if even that is too much."""
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
        """By the chat template, up to where the answer begins or to its end."""
        request = f"{asked.request}\n\n{asked.context}" if asked.context else asked.request
        turns_written = [*asked.history, Turn("user", request), *([] if answer is None else [Turn("assistant", answer)])]
        turns = [turn._asdict() for turn in turns_written]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
        except TemplateError as error:
            remedy = f"the model's chat template does not take such a conversation ({error}); leave out what it names"
            raise Refused("data.messages", ", ".join(turn.role for turn in turns_written), remedy) from error


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, asked: PromptParts, room: int) -> Tokens:
    """The at most `room` tokens with which a model is asked: those that it was trained on, up to where the answer begins."""
    form = PromptFormat.for_tokenizer(tokenizer)
    return form.prompts([form.shorten(asked, room, room)])[0][-room:]


def tokenise_answers(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[tuple[Tokens, ...], tuple[int, ...], FitCounts]:
    """Each example's prompt and answer in at most `max_length` tokens, where its answer begins, and to how many what happened.

    The answer keeps its place before the context and the turns before the request do. The request keeps its own before the answer
    does, as far as half of `max_length`: beyond that the end of a longer answer is cut off, its mark with it.
    """
    form, prompts_parts, answers = PromptFormat.for_tokenizer(tokenizer), _prompt_parts(examples), examples.answers or ()
    prompts = form.prompts(prompts_parts)
    ends = [form.with_end_mark(row) for row in form.tokens(map(form.answer_text, prompts_parts, answers))]
    ids, begins, happened = [], [], dict.fromkeys(FIT_NOTES, 0)
    for one, start, end, answer in zip(prompts_parts, prompts, ends, answers, strict=True):
        left, room = one, max_length - min(len(end), max_length // 2)
        if len(start) + len(end) > max_length:
            left = form.shorten(one, max_length - len(end), room)
            (start,) = form.prompts([left])
        for name in PromptParts._fields:
            happened[name] += getattr(left, name) != getattr(one, name)
        happened["form"] += len(start) > room
        happened["wordless"] += form.end_marks.issuperset(end)
        happened["mended"] += any(text != _replace_surrogates(text) for text in (one.request, one.context, answer))
        start = start[-room:]
        happened["answer"] += len(start) + len(end) > max_length
        ids.append((*start, *end[: max_length - len(start)]))
        begins.append(len(start))
    return tuple(ids), tuple(begins), FitCounts(len(prompts_parts), **happened)


def fit_notes(tokenizer: PreTrainedTokenizerBase, max_length: int, counts_by_use: Mapping[str, FitCounts | None]) -> list[str]:
    """What a reader of the figures has to know of the way from examples to tokens; `fitted` by what the examples are for."""
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
    """Without its middle: `kept` characters of its two ends."""
    return f"{text[: (length + 1) // 2]}{GAP}{text[len(text) - length // 2 :]}" if length else ""


def _without_oldest_turns(history: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Without the oldest turns, so that a user's comes first again; what a system was told goes last."""
    system = tuple(turn for turn in history if turn.role == "system")
    turns = tuple(turn for turn in history if turn.role != "system")
    if not turns:
        return ()
    first = next((place for place, turn in enumerate(turns) if place and turn.role == "user"), len(turns))
    return (*system, *turns[first:])


def _replace_surrogates(text: str) -> str:
    """Text that can be tokenised: JSON allows halves of a character (surrogates), Unicode does not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
