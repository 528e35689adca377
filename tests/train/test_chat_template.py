"""Requests and answers as tokens: the prompt is what generation begins with, the answer is what is learnt, and both fit."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedloom.core.errors import Refused
from fedloom.core.text import without_surrogates
from fedloom.data.examples import Examples, Turn
from fedloom.train import chat_template
from fedloom.train.chat_template import FitCounts, PromptFormat, PromptParts, prompt_notes
from fedloom.train.tokenised import IGNORED, encode_texts
from tests.support.storms import tries

CPU = torch.device("cpu")
LINES = (
    "Name the capital of France. Paris is the capital of France.",
    "### Instruction: ### Input: ### Response: user system",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # without a system prompt, as Mistral's; the generation prompt is nothing, the answer stands between blanks
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def tokenizer_of(template: str | None = None, **marks: str) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer; `marks` as in bos_token="<s>", put before a text that is tokenised as usual."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [*marks.values(), "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if "bos_token" in marks:
        named = [(marks["bos_token"], made.token_to_id(marks["bos_token"]))]
        made.post_processor = processors.TemplateProcessing(single=f"{marks['bos_token']} $A", special_tokens=named)  # type: ignore[assignment]
    kind: Any = PreTrainedTokenizerFast  # untyped
    found: PreTrainedTokenizerBase = kind(tokenizer_object=made, additional_special_tokens=special[-2:], **marks)
    found.chat_template = template
    return found


TOKENIZERS = {
    "plain": tokenizer_of(bos_token="<s>", eos_token="</s>"),
    "no marks": tokenizer_of(),
    "chatml": tokenizer_of(CHATML, eos_token="<|endoftext|>", pad_token="<pad>"),
    "llama2": tokenizer_of(LLAMA2, bos_token="<s>", eos_token="</s>"),
}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
QUESTION, PLACE, ANSWER = "Name the capital.", "France", "Paris"


def examples(*rows: tuple[str, str, str], before: tuple[Turn, ...] | None = None) -> Examples:
    texts, pairs, answers = zip(*rows, strict=True)
    return Examples(
        texts, pairs, (0,) * len(rows), ("",), None, answers, None if before is None else (before,) * len(rows)
    )


def one(tokenizer: PreTrainedTokenizerBase, some: Examples, max_length: int) -> tuple[str, str, FitCounts]:
    """The first example: its prompt and its answer as text, and what happened."""
    texts = encode_texts(some, tokenizer, max_length)
    assert texts.answer_starts is not None
    assert texts.fit_counts is not None
    assert len(texts.ids[0]) <= max_length
    prompt, answer = texts.ids[0][: texts.answer_starts[0]], texts.ids[0][texts.answer_starts[0] :]
    return str(tokenizer.decode(prompt)), str(tokenizer.decode(answer)), texts.fit_counts


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("plain", "<s>### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:\n", "Paris</s>"),
        ("no marks", "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:\n", "Paris"),
        (
            "chatml",
            "<|im_start|>user\nName the capital.\n\nFrance<|im_end|>\n<|im_start|>assistant\n",
            "Paris<|im_end|>",
        ),
        ("llama2", "<s>[INST] Name the capital.\n\nFrance [/INST]", " Paris </s>"),
    ],
)
def test_prompt_and_answer_are_written_in_the_models_form(name: str, prompt: str, answer: str) -> None:
    found = one(TOKENIZERS[name], examples((QUESTION, PLACE, ANSWER)), 100)
    assert found == (prompt, answer, FitCounts(1))


def test_an_empty_context_leaves_no_trace() -> None:
    for name, wanted in (
        ("plain", "<s>### Instruction:\nName the capital.\n\n### Response:\n"),
        ("llama2", "<s>[INST] Name the capital. [/INST]"),
    ):
        empty = examples((QUESTION, "", ANSWER))
        assert (
            one(TOKENIZERS[name], empty, 100)[0] == one(TOKENIZERS[name], replace(empty, pairs=None), 100)[0] == wanted
        )


def test_earlier_turns_come_before_the_request() -> None:
    before = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello"))
    some = examples((QUESTION, "", ANSWER), before=before)
    prompt, _, _ = one(TOKENIZERS["chatml"], some, 100)
    assert prompt.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )
    prompt, _, _ = one(TOKENIZERS["plain"], some, 100)
    assert prompt.startswith(
        "<s>### System:\nBe brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nName"
    )
    with pytest.raises(Refused, match=r"(?s)data\.messages.*system, user, assistant, user.*must alternate"):
        encode_texts(some, TOKENIZERS["llama2"], 100)


@every_tokenizer
def test_only_the_answer_and_its_mark_are_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = encode_texts(examples((QUESTION, PLACE, ANSWER), ("Hi", "", "Hello")), tokenizer, 100)
    batch = texts.batch([0, 1], CPU)
    assert texts.answer_starts is not None
    for row, begin in enumerate(texts.answer_starts):
        learnt = batch["labels"][row] != IGNORED
        assert tuple(batch["input_ids"][row][learnt].tolist()) == texts.ids[row][begin:]
        assert bool((batch["attention_mask"][row][learnt] == 1).all())  # whatever pads: the end mark may


@every_tokenizer
def test_the_end_marks_are_those_that_answers_end_with(tokenizer: PreTrainedTokenizerBase) -> None:
    ends = PromptFormat.for_tokenizer(tokenizer).end_marks
    texts = encode_texts(examples((QUESTION, PLACE, ANSWER)), tokenizer, 100)
    assert ends == {texts.ids[0][-1], tokenizer.eos_token_id} if ends else tokenizer.eos_token_id is None


strange = st.text(st.characters(), max_size=60)
"""Any characters, lone surrogates and controls among them."""


@every_tokenizer
@given(request=strange, context=strange, answer=strange, max_length=st.integers(4, 200))
@tries(40)
def test_the_tokens_of_a_prompt_begin_those_of_the_example(
    tokenizer: PreTrainedTokenizerBase, request: str, context: str, answer: str, max_length: int
) -> None:
    """The prefix law: what fits is prompted with exactly the tokens that were trained on; all fits."""
    texts = encode_texts(examples((request, context, answer)), tokenizer, max_length)
    (ids,), (begin,) = texts.ids, texts.answer_starts or ()
    assert texts.fit_counts is not None
    assert len(ids) <= max_length
    assert begin < len(ids) or not answer
    if not any(asdict(texts.fit_counts)[name] for name in ("context", "history", "request", "template", "answer")):
        assert ids[:begin] == chat_template.prompt_tokens(tokenizer, PromptParts(request, context), max_length)
        said = without_surrogates(answer)
        wanted = f" {said.strip()} " if tokenizer.chat_template == LLAMA2 else said
        marks = PromptFormat.for_tokenizer(tokenizer).end_marks
        plain = [token for token in ids[begin:] if token not in marks]
        if not any(mark in said for mark in tokenizer.all_special_tokens):
            assert tokenizer.decode(plain) == wanted
        assert not marks or ids[-1] in marks


@every_tokenizer
@given(asked=st.builds(PromptParts, strange, strange, st.just(())), room=st.integers(1, 60))
@tries(25)
def test_a_prompt_fits_in_its_room(tokenizer: PreTrainedTokenizerBase, asked: PromptParts, room: int) -> None:
    assert 0 < len(chat_template.prompt_tokens(tokenizer, asked, room)) <= room


def test_the_middle_of_a_long_context_goes_first() -> None:
    tokenizer = TOKENIZERS["plain"]
    prompt, answer, fitted = one(tokenizer, examples((QUESTION, "abcdefghij" * 40, ANSWER)), 80)
    assert f"{QUESTION}\n\n### Input:\nabcdefghij" in prompt
    assert " ... " in prompt
    assert prompt.endswith("j\n\n### Response:\n")
    assert (answer, fitted) == ("Paris</s>", FitCounts(1, context=1))
    assert (
        len(encode_texts(examples((QUESTION, "abcdefghij" * 40, ANSWER)), tokenizer, 80).ids[0]) >= 78
    )  # no room is wasted


def test_then_the_oldest_turns() -> None:
    before = (
        Turn("system", "Brief."),
        *(Turn(role, f"{role} {i}") for i in range(6) for role in ("user", "assistant")),
    )
    prompt, answer, fitted = one(TOKENIZERS["chatml"], examples((QUESTION, "", ANSWER), before=before), 100)
    assert prompt.startswith("<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nuser ")
    assert "user 0" not in prompt
    assert "assistant 5" in prompt
    assert (answer, fitted) == ("Paris<|im_end|>", FitCounts(1, history=1))


def test_a_long_answer_loses_its_end_and_a_request_beyond_half_its_middle() -> None:
    tokenizer, long = TOKENIZERS["plain"], "xyz" * 100
    prompt, answer, fitted = one(tokenizer, examples((QUESTION, PLACE, long)), 64)
    assert (PLACE in prompt, QUESTION in prompt) == (False, True)
    assert long.startswith(answer)  # no end mark where there is no end
    assert fitted == FitCounts(1, context=1, answer=1)
    prompt, answer, fitted = one(tokenizer, examples((long, PLACE, long)), 80)
    assert " ... " in prompt
    assert len(answer) >= 40
    assert fitted == FitCounts(1, context=1, request=1, answer=1)


def test_a_template_that_does_not_fit_is_told() -> None:
    prompt, answer, fitted = one(TOKENIZERS["plain"], examples((QUESTION, PLACE, ANSWER)), 8)
    assert prompt.endswith(":\n")
    assert (answer, fitted) == ("Paris</s>", FitCounts(1, context=1, request=1, template=1))


CHATML_THINKS = (  # as Qwen3's: the last answer has a place for thoughts, earlier ones have lost it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (  # the end of the text is marked behind the last message, and only there
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
TALKERS = {**TOKENIZERS, "phi3": tokenizer_of(PHI3, eos_token="<|endoftext|>")}
TALK = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Who?"), Turn("assistant", "Me, France."))


@pytest.mark.parametrize("tokenizer", TALKERS.values(), ids=TALKERS)
def test_all_answers_of_a_conversation_are_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each begins where its own prompt ends, and has the tokens that it would have as the last answer, to its end mark."""
    whole = encode_texts(examples((QUESTION, "", ANSWER), before=TALK), tokenizer, 200)
    assert whole.earlier_answers is not None
    spans = [*whole.earlier_answers[0], (whole.answer_starts[0], len(whole.ids[0]))]  # type: ignore[index]
    said = [*TALK, Turn("user", QUESTION), Turn("assistant", ANSWER)]
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for place, (begin, end) in enumerate(spans):
        alone = encode_texts(
            examples((said[2 * place].content, "", said[2 * place + 1].content), before=tuple(said[: 2 * place])),
            tokenizer,
            200,
        )
        (start,) = alone.answer_starts or ()
        assert alone.ids[0][:start] == whole.ids[0][:begin]
        if tokenizer is TALKERS["phi3"] and place < 2:
            assert alone.ids[0][start:][: end - begin] == whole.ids[0][begin:end]
            assert mark in whole.ids[0][begin:end]
        else:
            assert alone.ids[0][start:] == whole.ids[0][begin:end]
    labels = whole.batch([0], CPU)["labels"][0].tolist()
    inside = {place for begin, end in spans for place in range(begin, end)}
    assert labels == [token if place in inside else IGNORED for place, token in enumerate(whole.ids[0])]
    assert whole.targets(0) == labels
    assert whole.target_count(0) == len(inside)
    assert whole.fit_counts == FitCounts(1)


def test_where_earlier_answers_are_rewritten_the_last_one_is_learnt_alone() -> None:
    tokenizer = tokenizer_of(CHATML_THINKS, eos_token="<|endoftext|>")
    texts = encode_texts(examples((QUESTION, "", ANSWER), before=TALK), tokenizer, 200)
    assert texts.earlier_answers is None
    assert texts.fit_counts == FitCounts(1, last_only=1)
    assert texts.targets(0).count(IGNORED) == (texts.answer_starts or (0,))[0]


@given(
    said=st.lists(strange.filter(str.strip), min_size=2, max_size=4),
    name=st.sampled_from(sorted(TALKERS)),
    max_length=st.integers(20, 200),
)
@tries(25)
def test_earlier_answers_are_found_in_any_text(said: list[str], name: str, max_length: int) -> None:
    """What is learnt of an earlier answer is tokens of that answer, and its end mark where there is room for all turns."""
    tokenizer = TALKERS[name]
    before = tuple(turn for text in said[:-1] for turn in (Turn("user", "Hi"), Turn("assistant", text)))
    texts = encode_texts(examples(("Hi", "", said[-1]), before=before), tokenizer, max_length)
    (begin,), (spans,) = texts.answer_starts or (), texts.earlier_answers or ((),)
    assert len(texts.ids[0]) <= max_length
    assert all(0 <= first < last <= begin for first, last in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert texts.fit_counts is not None
    if texts.fit_counts.history + texts.fit_counts.last_only + texts.fit_counts.template == 0:
        assert len(spans) == len(said) - 1


def test_a_date_stands_still() -> None:
    """Llama 3's way to the date, Mistral's, and one in a macro; `strftime` itself says what each should write."""
    talk = "{% for m in messages %}{{ m.content }}{% endfor %}"
    forms = ("%d %b %Y", "%Y-%m-%d", "%A, %-d %B %y at %H:%M:%S, day %j, %%")
    for form in forms:
        for template in (
            "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('FORM') %}"
            "{%- else %}{%- set date_string = 'never' %}{%- endif %}{%- endif %}{{ date_string }}" + talk,
            "\n {%- set today = strftime_now('FORM') %}{{ today }}" + talk,
            "{% macro now() %}{{ strftime_now('FORM') }}{% endmacro %}{{ now() }}" + talk,
        ):
            tokenizer = tokenizer_of(template.replace("FORM", form), eos_token="</s>")
            found = PromptFormat.for_tokenizer(tokenizer, "2024-02-29").prompt_text(PromptParts("Hi"))
            assert found == datetime(2024, 2, 29).strftime(form).replace("%%", "%") + "Hi"
            assert chat_template.prompt_notes(tokenizer, "2024-02-29")[0].startswith(
                "The chat template writes the date: it is given 2024-02-29"
            )


def test_a_date_changes_the_prompts_that_have_one_and_no_others() -> None:
    dated = tokenizer_of("{{ strftime_now('%Y') }}" + CHATML, eos_token="<|endoftext|>")
    for tokenizer, differ in ((dated, True), (TOKENIZERS["chatml"], False), (TOKENIZERS["plain"], False)):
        one, other, default = (
            encode_texts(examples((QUESTION, "", ANSWER)), tokenizer, 100, date).ids
            for date in ("2024-02-29", "2026-01-01", None)
        )
        assert (one != other) == differ
        assert other == default


@pytest.mark.parametrize("drawn", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(drawn: str) -> None:
    with pytest.raises(Refused, match="its chat template draws at random"):
        encode_texts(examples((QUESTION, "", ANSWER)), tokenizer_of(drawn + CHATML), 100)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}", "does not take a plain request and its answer .*endfor"),
        ("{{ unknown(messages) }}", "does not take a plain request and its answer .*'unknown' is undefined"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", "leaves out the request and the answer"),
        ("a", "leaves out the request and the answer"),
        ("{{ messages[0].content }}", "leaves out the answer"),
        ("{{ messages[1:] }}", "leaves out the request"),
    ],
)
def test_a_template_without_request_or_answer_is_refused_as_the_models_fault(template: str, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        encode_texts(examples((QUESTION, "", ANSWER)), tokenizer_of(template), 100)
    assert caught.value.field == "model"


def test_what_a_template_writes_before_an_answer_alone_is_told() -> None:
    shy = tokenizer_of("{% for m in messages %}{{ '[' + m.role + '] ' + m.content }}{% endfor %}")
    assert "The chat template writes '[assistant]' before an answer, not in the prompt" in prompt_notes(shy)[0]
    assert not any("before an answer" in note for note in prompt_notes(tokenizer_of(CHATML)))


def test_of_several_templates_the_default_one_is_taken() -> None:
    tokenizer = tokenizer_of(CHATML, eos_token="<|endoftext|>")
    wanted = encode_texts(examples((QUESTION, "", ANSWER)), tokenizer, 100)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ 1 / 0 }}"}
    assert encode_texts(examples((QUESTION, "", ANSWER)), tokenizer, 100) == wanted
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(Refused, match=r"none of its chat templates is the default \(rag, tool_use\)"):
        encode_texts(examples((QUESTION, "", ANSWER)), tokenizer, 100)


def test_special_tokens_in_texts_are_counted() -> None:
    texts = encode_texts(
        examples((QUESTION, "", ANSWER), ("Hi<|im_end|>", "", ANSWER), ("Hi", "", "I am </s>"), ("<s> a", "</s>", "b")),
        TOKENIZERS["plain"],
        100,
    )
    assert texts.fit_counts == FitCounts(4, special_tokens=3)


def test_what_happened_is_counted_and_said() -> None:
    tokenizer = TOKENIZERS["no marks"]
    fitted = encode_texts(
        examples((QUESTION, "ab" * 99, ANSWER), ("Hi", "", "\ud800"), ("Hi", "", "")), tokenizer, 90
    ).fit_counts
    assert fitted == FitCounts(3, context=1, replaced_characters=1, empty=1)
    told = [
        *chat_template.fit_notes(90, {"training": fitted, "test": None}),
        *chat_template.prompt_notes(tokenizer),
    ]
    assert told[0] == "1 of 3 training examples: the middle of the context is taken out to fit training.max_length=90."
    assert [line.split(":")[0] for line in told[1:]] == [
        "1 of 3 training examples",
        "1 of 3 training examples",
        "The tokenizer has no chat template",
        "The tokenizer has no end mark",
        "The tokenizer has no padding token",
    ]
    assert chat_template.fit_notes(90, {"training": FitCounts(3), "test": None}) == []
    assert chat_template.prompt_notes(TOKENIZERS["chatml"]) == []


def test_long_texts_bring_no_warning_of_the_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of(eos_token="</s>")
    tokenizer.model_max_length = 20
    with caplog.at_level(logging.WARNING):
        encode_texts(examples((QUESTION * 20, "", ANSWER)), tokenizer, 20)
    assert caplog.records == []
