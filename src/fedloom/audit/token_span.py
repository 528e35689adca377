"""Which tokens did a client's texts have, and where? The gradient of `down` lies in the span of what its layer read.

The gradient of `down` is up^T dY^T X: its rows are sums of the layer's inputs X. Layers that read the embeddings share X, so a server
sees as many directions of the span of a text's embeddings as these layers have rows; with no fewer than tokens, and one step of a
linear optimiser, the span is known, and the embedding of a token at a place lies in it or does not (Petrov et al., "DAGER", arXiv
2405.15586, 2024, section 4). Many rows, several steps and Adam blur it; they are no proof against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedloom.audit.exchanges import AuditScene
from fedloom.audit.findings import Adversary, Finding, Outcome, Unmeasured
from fedloom.audit.statistics import share_interval
from fedloom.core.lora import Adapter, product_difference, product_norm
from fedloom.core.truncated_svd import svd
from fedloom.train import peft_weights
from fedloom.train.base_model import Base

PlacedToken: TypeAlias = tuple[int, int]
"""A place of a text, and the token there."""

NEGLIGIBLE = 1e-3
"""Singular values below this share of the largest are the rounding of float16, not a direction."""
ROUNDING = 1e-5
"""Singular values of a change below this share of the whole product are its rounding in float32."""
TOKENS_TOGETHER = 512
"""Tokens of the vocabulary that are embedded in one pass."""
TOP, ATTACKED, PLACES, MOST_TOKENS = 10, 4, 8, 200
"""A token counts as found among so many first guesses; answers (or versions) that are attacked, places of a text that are tried, and
tokens of each answer at most."""
TINY = 1e-30


class _Reached(Exception):  # no error: ends a pass through the model where enough of it was seen
    """The input that was asked for is there."""


def down_changes(start: Adapter, answer: Adapter) -> dict[str, Tensor]:
    """Return by how much `down` (rank, d_in) of each layer moved."""
    return {
        name: factor.down - start.factors[name].down[: factor.rank]
        for name, factor in answer.factors.items()
        if name in start.factors
    }


def new_rows(start: Adapter, answer: Adapter, layers: Iterable[str]) -> dict[str, Tensor]:
    """Return for these layers what is new in the row space of the product: (directions, d_in), orthogonal to the rows before.

    Of two versions in whatever basis; layers in which nothing is new are left out.
    """
    found = dict[str, Tensor]()
    for name in layers:
        old, new = start.factors[name].down.double(), answer.factors[name]
        change = product_difference(new, start.factors[name])
        _, values, directions = svd(change.up.double(), change.down.double(), change.rank)
        known = torch.linalg.qr(old.T).Q
        rows = values[:, None] * (directions - (directions @ known) @ known.T)
        _, lengths, directions = torch.linalg.svd(rows, full_matrices=False)
        least = max(NEGLIGIBLE * float(values.max()), ROUNDING * product_norm(new))
        new_directions = directions[lengths > least]
        if len(new_directions):
            found[name] = new_directions.float()
    return found


def span_basis(rows: Iterable[Tensor]) -> Tensor:
    """Return an orthonormal basis (directions, width) of the span of all rows of these matrices (rank, width)."""
    unit = torch.cat([each / each.norm().clamp_min(TINY) for each in rows])
    _, values, directions = torch.linalg.svd(unit.double(), full_matrices=False)
    basis: Tensor = directions[values > NEGLIGIBLE * values[0]].float()
    return basis


def input_layers(base: Base) -> list[str]:
    """Return the names of the adapted layers that read the embeddings: those of the first block.

    With PEFT's default layers of a BERT (query, value) all of them do.
    """
    found = peft_weights.transformer_blocks(base.model)
    path = found[0] if found else ""
    return [name for name in peft_weights.lora_layers(base.model) if name.startswith(f"{path}.0.")]


def local_layers(base: Base) -> list[str]:
    """Return those `input_layers` whose input at a place depends on the token at that place alone; it is found by trying it."""
    names, caught = input_layers(base), dict[str, Tensor]()
    for name in names:
        caught[name] = layer_input(base, name, torch.tensor([[0, 0, 2], [1, 1, 2]]))
    last = {name: read[:, -1] for name, read in caught.items()}
    return [name for name, (one, other) in last.items() if torch.allclose(one, other, rtol=1e-4, atol=1e-5)]


@torch.no_grad()
def layer_input(base: Base, layer: str, ids: Tensor) -> Tensor:
    """Return what a layer reads of texts of token ids (texts, places): (texts, places, d_in). The model above it is not computed."""
    inner: Any = base.model.get_base_model()
    caught = list[Tensor]()

    def catch(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        caught.append(args[0] if args else named["x"])
        raise _Reached

    hook = inner.get_submodule(layer).register_forward_pre_hook(catch, with_kwargs=True)
    ids = ids.to(base.device)
    more = {"decoder_input_ids": ids} if inner.config.is_encoder_decoder else {}
    base.model.eval()
    try:
        inner(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    except _Reached:
        pass
    finally:
        hook.remove()
    return caught[0].float()


def token_ranks(
    base: Base, layer: str, bases: Sequence[Tensor], wanted: Sequence[Sequence[PlacedToken]]
) -> list[list[list[float]]]:
    """Rank tokens of texts among the whole vocabulary, by the share of their vectors at a place that lies inside a span.

    Args:
        base: the model.
        layer: a layer that reads embeddings, of `local_layers`.
        bases: orthonormal bases (directions, width), as `span_basis` returns them.
        wanted: lists of tokens to rank, each with its place.

    Returns:
        For each basis and each list the ranks of its tokens: 1 is the first, half of the vocabulary is chance; ties share a rank.
    """
    inner: Any = base.model.get_base_model()
    size = inner.get_input_embeddings().weight.shape[0]
    places = sorted({place for own in wanted for place, _ in own})
    shares = torch.zeros(len(bases), len(places), size)
    for low in range(0, size, TOKENS_TOGETHER):
        tokens = torch.arange(low, min(size, low + TOKENS_TOGETHER))
        vectors = layer_input(base, layer, tokens[:, None].repeat(1, max(places) + 1))[:, places]
        unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(TINY)
        for share, basis in zip(shares, bases, strict=True):
            share[:, low : low + len(tokens)] = (unit @ basis.to(unit).T).square().sum(-1).T.cpu()
    column = {place: k for k, place in enumerate(places)}
    return [[[_rank_of(share[column[place]], token) for place, token in own] for own in wanted] for share in shares]


def _rank_of(scores: Tensor, token: int) -> float:
    above, equal = int((scores > scores[token]).sum()), int((scores == scores[token]).sum())
    return 1 + above + (equal - 1) / 2


# The attacks on a run ----------------------------------------------------------------------------------------------------


def word_outcomes(scene: AuditScene) -> Iterator[Outcome]:
    """Name words at their places in clients' texts, from single answers and from the step between two versions."""
    layers = local_layers(scene.base)
    answers, versions = list[tuple[Tensor, list[int]]](), list[tuple[Tensor, list[int]]]()
    for client, one in scene.seen.latest.items():
        changes = down_changes(one.task.start.train, one.answer)
        moved = [changes[name] for name in layers if name in changes and bool(changes[name].any())]
        if moved and len(answers) < ATTACKED and client in scene.took_part:
            rows = {row for batch in scene.trainer.batches(one.task) for row in batch}
            answers.append((span_basis(moved), sorted(rows)))
    for step in scene.known_steps()[-ATTACKED:]:
        shared = [name for name in layers if name in step.after.adapter.factors and name in step.before.adapter.factors]
        found = new_rows(step.before.adapter, step.after.adapter, shared)
        if found:
            rows = {row for client in step.clients for row in scene.trainer.shards[client]}
            versions.append((span_basis(found.values()), sorted(rows)))
    yield _word_outcome(scene, "server", "answers", layers, answers)
    yield _word_outcome(scene, "member", "versions", layers, versions)
    alone = "one model has nothing before it to compare with; what members find is more"
    yield Unmeasured("reader", "words", alone)


def _word_outcome(
    scene: AuditScene, adversary: Adversary, noun: str, layers: Sequence[str], spans: Sequence[tuple[Tensor, list[int]]]
) -> Outcome:
    if not layers:
        return Unmeasured(adversary, "words", "no adapted layer reads the embeddings of single words")
    wanted = [_placed_tokens(scene, rows) for _, rows in spans]
    if len(spans) < 2 or not all(wanted):
        none = f"it takes two {noun} in which a layer that reads the words was trained, and {len(spans)} were there"
        return Unmeasured(adversary, "words", none)
    ranks = token_ranks(scene.base, layers[0], [basis for basis, _ in spans], wanted)
    own = [rank <= TOP for k, row in enumerate(ranks) for rank in row[k]]
    # what the span of somebody else says of these texts is what chance gives
    alien = [rank <= TOP for k, row in enumerate(ranks) for j, part in enumerate(row) if j != k for rank in part]
    low, high = share_interval(sum(own), len(own))
    measure = f"share of words among the first {TOP} guesses for their place"
    trials = f"{len(own)} words of {len(spans)} {noun}"
    return Finding(adversary, "words", measure, sum(own) / len(own), sum(alien) / len(alien), low, high, trials)


def _placed_tokens(scene: AuditScene, rows: Sequence[int]) -> list[PlacedToken]:
    """Return tokens of these rows at some places, each pair once, without the tokenizer's marks."""
    ids, marks = scene.texts.ids, {*scene.base.tokenizer.all_special_ids}
    longest = max(len(ids[row]) for row in rows)
    places = range(1, longest, max(1, longest // PLACES))
    placed = ((place, ids[row][place]) for row in rows for place in places if place < len(ids[row]))
    return list(dict.fromkeys(one for one in placed if one[1] not in marks))[:MOST_TOKENS]
