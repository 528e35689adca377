"""The loss of models that write: what is predicted, how it is averaged, and that no way of computing it changes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom.core.lora import Adapter, cut_factor
from fedloom.core.types import ClientState, Task
from fedloom.train import loss, peft_weights
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.engine import frozen_layers
from fedloom.train.engine.dropout import training_mode
from fedloom.train.evaluate import score
from fedloom.train.settings import PLAIN
from fedloom.train.tokenised import IGNORED
from fedloom.train.trainer import enable_gradients
from tests.support.tiny_models import WORDS, hush
from tests.support.tiny_runs import answered, frozen, lively, same, task_of, writer_of, writing_trainer

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2", "headless"])


@pytest.fixture
def model(request: pytest.FixtureRequest, kind: str, generator: Path, decoder: Path, tmp_path: Path) -> Path:
    """A Llama with a tied head, a GPT-2 (positions learnt, Conv1D), or a Llama whose head is new and therefore trained and sent."""
    if kind == "llama":
        return generator
    if kind == "headless":
        return decoder
    hush()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # type: ignore[arg-type]
    config = GPT2Config(vocab_size=len(WORDS) + 4, initializer_range=0.2, bos_token_id=1, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((generator / name).read_bytes())
    return tmp_path


@torch.no_grad()
def by_hand(base: Base, texts: object, indices: list[int]) -> list[float]:
    """One example after the other without padding: -log p of each answer token after all before it, and their mean."""
    found = []
    for i in indices:
        ids, begin = torch.tensor([texts.ids[i]]), texts.answer_starts[i]  # type: ignore[attr-defined]
        told = base.model(input_ids=ids).logits[0].log_softmax(1)
        each = [-float(told[t - 1, ids[0, t]]) for t in range(max(1, begin), ids.shape[1])]
        found.append(sum(each) / len(each))
    return found


def gradients(base: Base, task: Task, found: Tensor) -> list[Tensor]:
    slot = f"r{task.budget.rank}"
    weights = enable_gradients(peft_weights.slot_parameters(base.model, slot), task.start)
    return [*torch.autograd.grad(found, [*weights.values()])]


def close(ours: list[Tensor], theirs: list[Tensor], error: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm()) <= error * float(other.norm())


@KINDS
def test_an_example_is_the_mean_of_its_answers_tokens_and_a_batch_the_mean_of_its_examples(model: Path) -> None:
    # methods 2g: the loss is per sample; a mean over all tokens would count a long answer more
    base = writer_of(model)
    texts, some = answered(base), [3, 8, 1, 30]
    base.put(lively(initial_adapter(base, 4)))
    base.model.eval()
    with torch.no_grad():
        wanted = by_hand(base, texts, some)
        inputs = texts.batch(some, base.device)
        assert loss.example_losses(base, inputs).tolist() == pytest.approx(wanted, rel=1e-4)
        assert float(loss.mean_loss(base, inputs)) == pytest.approx(sum(wanted) / 4, rel=1e-4)


@KINDS
def test_a_conversation_is_the_mean_over_the_tokens_of_all_its_answers(model: Path) -> None:
    """One that has three answers in a row against three examples that end with one each: the same tokens, the same losses."""
    base = writer_of(model)
    one = answered(base, 3)
    assert one.answer_starts is not None
    talk = one.ids[0] + one.ids[1][1:] + one.ids[2][1:]
    after = [len(one.ids[0]) - 1, len(one.ids[0]) + len(one.ids[1]) - 2]
    spans = [(one.answer_starts[0], after[0] + 1), (after[0] + one.answer_starts[1], after[1] + 1)]
    last = after[1] + one.answer_starts[2]
    whole = replace(one, ids=(talk,), answer_starts=(last,), earlier_answers=(tuple(spans),))
    apart = replace(one, ids=tuple(talk[:end] for end in (spans[0][1], spans[1][1], len(talk))))
    apart = replace(apart, answer_starts=(spans[0][0], spans[1][0], last))
    base.put(lively(initial_adapter(base, 4)))
    with torch.no_grad():
        found = loss.example_losses(base, whole.batch([0], base.device))
        each = loss.example_losses(base, apart.batch([0, 1, 2], base.device))
    counts = [apart.target_count(i) for i in range(3)]
    assert whole.target_count(0) == sum(counts)
    assert float(found) == pytest.approx(
        sum(map(float.__mul__, each.tolist(), map(float, counts))) / sum(counts), rel=1e-4
    )
    scores = [score(base, None, texts, range(len(texts.ids))).counts() for texts in (whole, apart)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_long_answers_weigh_no_more_than_short_ones(generator: Path) -> None:
    base = writer_of(generator)
    texts = answered(base)
    long = texts.ids[0] + texts.ids[1][1:] * 3
    both = replace(texts, ids=(long, texts.ids[1]), answer_starts=(1, len(texts.ids[1]) - 1))
    with torch.no_grad():
        inputs = both.batch([0, 1], base.device)
        assert float(loss.mean_loss(base, inputs)) == pytest.approx(sum(by_hand(base, both, [0, 1])) / 2, rel=1e-4)


def test_padding_on_the_left_is_never_asked_and_an_answer_may_begin_at_once(generator: Path) -> None:
    base = writer_of(generator)
    right = replace(answered(base), answer_starts=(0,) * 60)  # the first token has nothing before it
    with torch.no_grad():
        losses = [
            loss.example_losses(base, replace(right, pad_left=left).batch([3, 8, 1], base.device))
            for left in (False, True)
        ]
    assert losses[0].tolist() == pytest.approx(by_hand(base, right, [3, 8, 1]), rel=1e-4)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_needs_no_mask_and_on_the_left_it_does(generator: Path) -> None:
    """As on a GPU, where flash attention takes none."""
    base = writer_of(generator)
    base.put(lively(initial_adapter(base, 4)))
    assert not loss.reads_padding(base)
    inputs = answered(base).batch([3, 8, 1], base.device)
    with torch.no_grad():
        masked = loss.example_losses(base, inputs)
        plain = loss.example_losses(base, {name: rows for name, rows in inputs.items() if name != "attention_mask"})
    torch.testing.assert_close(plain, masked, rtol=1e-5, atol=1e-6)
    left = writer_of(generator)
    left.tokenizer.padding_side = "left"
    assert loss.reads_padding(left)


def test_an_example_without_an_answer_costs_nothing_and_breaks_nothing(generator: Path) -> None:
    base = writer_of(generator)
    texts = answered(base)
    none = replace(texts, answer_starts=(len(texts.ids[0]), *texts.answer_starts[1:]))  # type: ignore[misc]
    found = loss.example_losses(base, none.batch([0, 1], base.device)).detach()
    assert float(found[0]) == 0.0
    assert bool(found.isfinite().all())


def test_the_head_is_applied_to_the_tokens_before_an_answer_only(generator: Path) -> None:
    base = writer_of(generator)
    texts, seen = answered(base), list[tuple[int, ...]]()
    head = base.model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    loss.mean_loss(base, texts.batch([0, 5, 9], base.device))
    hook.remove()
    assert seen == [(sum(len(texts.ids[i]) - texts.answer_starts[i] for i in (0, 5, 9)), base.vocabulary)]  # type: ignore[index]


@KINDS
def test_gradients_are_those_of_torch_on_all_logits(model: Path) -> None:
    base = writer_of(model)
    texts, task = answered(base), task_of(lively(initial_adapter(base, 4)))
    base.put(task.start.train)
    inputs = texts.batch([2, 9, 4], base.device)
    ours = gradients(base, task, loss.mean_loss(base, inputs))
    labels = inputs.pop("labels")
    logits = base.model(**inputs).logits[:, :-1]
    every = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    close(ours, gradients(base, task, (every.sum(1) / (labels[:, 1:] != IGNORED).sum(1)).mean()))


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_the_top_layers_has_the_gradients_of_the_whole_model(model: Path, checkpointing: bool) -> None:
    base = writer_of(model, engine=replace(PLAIN, checkpointing=checkpointing))
    texts, whole = answered(base), lively(initial_adapter(base, 4))
    task = task_of(Adapter({n: f for n, f in whole.factors.items() if ".1." in n}, {}))
    if whole.dense:
        task = task_of(Adapter(task.start.train.factors, whole.dense))
    base.put(task.start.train)
    base.model.train()
    place = frozen_layers.split_layers(base, [*task.start.train.factors])
    assert place is not None
    below, batch = (
        frozen_layers.frozen_features(base, texts, place, range(30), (), frozen_layers.ActivationCache(), 0),
        [7, 3, 20, 11],
    )
    enable_gradients(peft_weights.slot_parameters(base.model, "r4"), task.start)
    with place.starting_from(below.for_batch(batch)):
        found = loss.mean_loss(base, texts.batch(batch, base.device))
    ours = gradients(base, task, found)
    close(ours, gradients(base, task, loss.mean_loss(base, texts.batch(batch, base.device))))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_computing_layers_again_changes_no_gradient(model: Path) -> None:
    found = []
    for checkpointing in (False, True):
        base = writer_of(model, engine=replace(PLAIN, checkpointing=checkpointing))
        task = task_of(lively(initial_adapter(base, 4)), steps=2)
        saved = 0

        def kept(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            ((result, _),) = writing_trainer(base).train([(task, ClientState())])
        found.append((result, saved))
    (one, much), (other, little) = found
    assert same(one.adapter, other.adapter)
    assert little < 0.7 * much


@KINDS
def test_several_clients_in_one_pass_get_what_each_would_alone(model: Path) -> None:
    base = writer_of(model)
    starts = [lively(initial_adapter(base, 4), seed) for seed in range(2)]
    low = Adapter({n: cut_factor(f, 2) for n, f in starts[1].factors.items()}, starts[1].dense)
    work = [(task_of(starts[0], "a", 3, 1), ClientState()), (task_of(low, "b", 3, 2), ClientState())]
    trainer = writing_trainer(base, learning_rate=1e-3)
    common = replace(trainer, engine=replace(PLAIN, together=4))
    assert len(common.groups(work)) == 1
    for (task, _), (one, _), (other, _) in zip(work, trainer.train(work), common.train(work), strict=True):
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        for name, f in one.adapter.factors.items():
            moved = (f.up - task.start.train.factors[name].up).norm()
            assert (f.up - other.adapter.factors[name].up).norm() <= 0.03 * moved


@pytest.mark.parametrize("base_dropout", [False, True])
def test_the_trial_of_padding_leaves_each_part_in_its_mode(generator: Path, base_dropout: bool) -> None:
    base = writer_of(generator, dropout=0.05)
    base.trials.clear()
    with training_mode(base.model, base_dropout):
        before = [module.training for module in base.model.modules()]
        assert not loss.reads_padding(base), "no token of a decoder sees a later one"
        assert [module.training for module in base.model.modules()] == before
    assert any(before)


def test_training_lowers_the_loss_and_changes_the_adapter_alone(generator: Path) -> None:
    base = writer_of(generator, dropout=0.05, target_modules="all-linear")
    before, start = frozen(base), initial_adapter(base, 4)
    ((result, _),) = writing_trainer(base).train([(task_of(start, steps=20), ClientState())])
    assert result.metrics["loss"] < 0.8 * result.metrics["first_loss"]
    assert result.adapter.dense == {}
    after = frozen(base)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.tokens > 0


def test_a_head_that_is_adapted_itself_is_told_apart_by_client(generator: Path) -> None:
    base = writer_of(generator, target_modules=("q_proj", "lm_head"))
    starts = [lively(initial_adapter(base, 4), seed) for seed in range(2)]
    work = [(task_of(starts[0], "a", 1, 1), ClientState()), (task_of(starts[1], "b", 1, 2), ClientState())]
    trainer = writing_trainer(base)
    common = replace(trainer, engine=replace(PLAIN, together=4))
    for (one, kept), (other, also) in zip(trainer.train(work), common.train(work), strict=True):
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
        for name, state in kept.moments.items():
            close([also.moments[name]["exp_avg"]], [state["exp_avg"]])
