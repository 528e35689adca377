"""Requests and answers as tokens: the prompt is what generation begins with, the answer is what is learnt, and both fit."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Turn
from fedloom.train import chat_template
from fedloom.train.chat_template import FitCounts, PromptFormat, PromptParts
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
        "<s>### System:\nBe brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nName"
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
        said = chat_template._replace_surrogates(answer)
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


def test_what_happened_is_counted_and_said() -> None:
    tokenizer = TOKENIZERS["no marks"]
    fitted = encode_texts(
        examples((QUESTION, "ab" * 99, ANSWER), ("Hi", "", "\ud800"), ("Hi", "", "")), tokenizer, 90
    ).fit_counts
    assert fitted == FitCounts(3, context=1, replaced_characters=1, empty=1)
    told = chat_template.fit_notes(tokenizer, 90, {"training": fitted, "test": None})
    assert told[0] == "1 of 3 training examples: the middle of the context is taken out to fit training.max_length=90."
    assert [line.split(":")[0] for line in told[1:]] == [
        "1 of 3 training examples",
        "1 of 3 training examples",
        "The tokenizer has no chat template",
        "The tokenizer has no end mark",
        "The tokenizer has no token to pad with",
    ]
    assert chat_template.fit_notes(TOKENIZERS["chatml"], 90, {"training": FitCounts(3)}) == []
    assert chat_template.fit_notes(tokenizer, 90, {"training": None, "test": None}) == []


def test_long_texts_bring_no_warning_of_the_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of(eos_token="</s>")
    tokenizer.model_max_length = 20
    with caplog.at_level(logging.WARNING):
        encode_texts(examples((QUESTION * 20, "", ANSWER)), tokenizer, 20)
    assert caplog.records == []
