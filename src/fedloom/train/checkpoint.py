"""Questions that are asked of a model and its tokenizer before anything is trained: what is this checkpoint?

Each answer is an adaptation of the model, a refusal with its remedy, or a note. The same questions are asked where a run is prepared
and at each site. Those that need texts are in `text_checks`; whether the weights are all there is asked in `pretrained`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.core.errors import Refused
from fedloom.core.text import list_some
from fedloom.train import peft_weights
from fedloom.train.pretrained import IN_BLOCK, WeightReport, body_parameters, input_embedding
from fedloom.train.targets import HEADS

BLOCK = re.compile(r".*?\.\d+\.")
"""The name of a block, in that of a parameter."""
BUFFER = re.compile(r"attn\.(masked_)?bias$|attention\.(masked_)?bias$|inv_freq$|position_ids$|_cached$")
"""Tables that older checkpoints hold, and models compute."""
NAMED_LABELS = 5
"""Labels that a note lists."""
ROUNDING = 1e-3
"""Largest change of logits, to the largest of them, that is rounding."""


def examine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: WeightReport,
    label_names: Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ask what concerns model and tokenizer alone, and adapt the model where that answers it.

    Returns the label names in the order of the model's outputs (None was given: it writes text), and notes. Raises Refused.
    """
    name = str(model.name_or_path)
    check_finite(model, name)
    weights, tokens = weight_notes(model, report, label_names is not None), check_tokens(model, tokenizer, name)
    notes = (*weights, *tokens, *make_repeatable(tokenizer))
    if label_names is None:
        tokenizer.padding_side = "right"  # a token's position is its number then, also where positions are learnt
        return (), notes
    order, about_head = adopt_head(model, report, label_names) if label_names else ((), ())
    return order, (*choose_one_label(model), *about_head, *choose_padding_side(model, tokenizer), *notes)


def make_repeatable(tokenizer: Any) -> tuple[str, ...]:
    """Switch BPE dropout (Provilkov et al., arXiv 1910.10267) off, which draws from no seed; return notes."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if not getattr(model, "dropout", None):
        return ()
    model.dropout = None  # type: ignore[union-attr]
    return ("The tokenizer leaves merges out at random (BPE dropout): switched off, so that a run can be repeated.",)


def head_modules(model: PreTrainedModel, report: WeightReport, labelled: bool) -> list[str]:
    """Return the modules that are trained and sent whole, besides `HEADS`.

    Of a classifier they are all that its base model lacks, whether the checkpoint has them or not; of any model also what the
    checkpoint lacks, such as a pooler. Each is the highest module that is of this kind as a whole.
    """
    all_names = {name for name, _ in model.named_parameters()}
    known = all_names - report.new
    if labelled:
        known &= body_parameters(model).keys()
    heads = set()
    for key in all_names - known:
        owners = accumulate(key.split(".")[:-1], "{}.{}".format)
        heads.add(next((o for o in owners if not any(name.startswith(f"{o}.") for name in known)), HEADS[0]))
    return sorted(heads - set(HEADS))


def adopt_head(
    model: PreTrainedModel, report: WeightReport, names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Make a classifier's head fit labels of these names; return the names in the order of its outputs, and notes.

    A head that the checkpoint brings is used where it tells the same labels apart, and its order is taken then. A head for other
    labels starts anew, drawn from torch's generator. Where labels are known by number alone, the numbers decide.
    """
    names, config = tuple(names), cast(Any, model.config)
    layer = _output_layer(model, len(names))
    if layer is None or f"{layer}.weight" in report.new:
        rows = report.resized.get(f"{layer}.weight")
        text = f"The checkpoint's head has {rows and rows[0]} outputs, the data {len(names)} labels: it starts anew."
        return names, (text,) if rows else ()
    there = _stated_names(config, len(names))
    stated = getattr(config, "architectures", None)
    made_as = [one for one in (stated if isinstance(stated, list) else ()) if "SequenceClassification" not in str(one)]
    if made_as:
        _draw_again(model, layer)
        return names, (f"The checkpoint is a {made_as[0]}, which does not label whole texts: its head starts anew.",)
    if (order := same_names(names, there)) is not None:
        return order, () if order == names else (f"The labels have the checkpoint's order: {_listed(order)}.",)
    numbered = sorted(names, key=lambda name: int(name) if name.isdecimal() else -1)
    if numbered == [str(number) for number in range(len(names))]:
        names = tuple(numbered)
    elif not _unnamed(there):
        _draw_again(model, layer)
        return names, (f"The checkpoint tells other labels apart ({_listed(there)}): its head starts anew.",)
    outputs = [str(number) if _unnamed(there) else f"{number} ({name:.40})" for number, name in enumerate(there)]
    pairs = [f"{output} is {name!r:.40}" for output, name in zip(outputs, names, strict=True)]
    return names, (f"The checkpoint's head is used, its labels by number: {_listed(pairs)}.",)


def _stated_names(config: Any, count: int) -> tuple[str, ...]:
    """Return the labels of a checkpoint's outputs: of `id2label` or, where it has none, of `label2id`, which transformers drops."""
    there = tuple(str(config.id2label.get(number, f"LABEL_{number}")) for number in range(count))
    if not _unnamed(there):
        return there
    written = config.get_config_dict(config.name_or_path)[0].get("label2id")
    numbers = written if isinstance(written, dict) and len(written) == count else {}
    by_number = {str(number): str(name) for name, number in numbers.items()}
    return tuple(by_number.get(str(number), name) for number, name in enumerate(there))


def _unnamed(names: Sequence[str]) -> bool:
    """Whether these are the names that transformers gives to outputs without names."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def _output_layer(model: PreTrainedModel, labels: int) -> str | None:
    """Return the name of the layer whose outputs are the logits of the labels; None where it cannot be told."""
    body, found = body_parameters(model), None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == labels and f"{name}.weight" not in body:
            found = name
    return found


def _draw_again(model: PreTrainedModel, layer: str) -> None:
    """Initialise a layer as transformers does where a checkpoint lacks it."""
    module = model.get_submodule(layer)
    for parameter in module.parameters():
        setattr(parameter, "_is_hf_initialized", False)  # noqa: B010  # transformers' mark
    with torch.no_grad():
        model._init_weights(module)  # type: ignore[no-untyped-call]


def same_names(names: Sequence[str], there: Sequence[str]) -> tuple[str, ...] | None:
    """Return `names` in the order that they have there; None where they are others. Case and outer blanks count only if they must."""
    for plain in (str, lambda name: name.strip().casefold()):
        own = {plain(name): name for name in names}
        if len(own) == len(names) and sorted(own) == sorted(plain(name) for name in there):
            return tuple(own[plain(name)] for name in there)
    return None


def _listed(names: Sequence[str]) -> str:
    return list_some([f"{name:.60}" for name in names], NAMED_LABELS)


def choose_one_label(model: PreTrainedModel) -> tuple[str, ...]:
    """Make a classifier's loss that of one label for each text, whatever the checkpoint was trained for; return notes."""
    kind = getattr(model.config, "problem_type", None)
    if kind in (None, "single_label_classification"):
        return ()
    model.config.problem_type = "single_label_classification"
    return (f"The checkpoint was made for {kind}: it is trained here with one label for each text.",)


@torch.no_grad()
def choose_padding_side(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Pad on the right where padding on the left changes the logits, as it does where positions are learnt; return notes."""
    if tokenizer.padding_side != "left":
        return ()
    row, pad, training = tokenizer("a b c")["input_ids"], tokenizer.pad_token_id or 0, model.training
    ids, mask = (
        [torch.tensor([[fill] * k + part], device=model.device) for k in (0, 3)]
        for fill, part in ((pad, row), (0, [1] * len(row)))
    )
    model.eval()  # type: ignore[no-untyped-call]
    try:
        alone, padded = (model(input_ids=i, attention_mask=m).logits for i, m in zip(ids, mask, strict=True))
    except (ValueError, RuntimeError, IndexError):  # the texts of the run are tried, too, and refused with a sentence
        return ()
    finally:
        model.train(training)
    if float((alone - padded).abs().max()) <= ROUNDING * float(alone.abs().max()):
        return ()
    tokenizer.padding_side = "right"
    return (
        "Texts are padded on the right: padding on the left, the tokenizer's side, would change what the model computes.",
    )


def weight_notes(model: PreTrainedModel, report: WeightReport, labelled: bool) -> tuple[str, ...]:
    """Return notes on weights that are not used, on a head of which a part is missing, and on one that writes and is new."""
    notes = []
    stated, missing = getattr(model.config, "architectures", None), sorted(report.new - report.resized.keys())
    if labelled and missing and isinstance(stated, list) and type(model).__name__ in stated:
        notes.append(f"The checkpoint lacks a part of its head, which starts anew: {_listed(missing)}.")
    shapes = {_without_numbers(name) for name in body_parameters(model) if IN_BLOCK.search(f".{name}")}
    prefix = f"{model.base_model_prefix}."
    unused = [
        key
        for key in report.unused
        if {_without_numbers(one) for one in (key, f"{prefix}{key}", key.removeprefix(prefix))} & shapes
    ]
    if unused:
        notes.append(
            f"The checkpoint has more blocks than its config.json says: {len(unused)} of its weights are not used."
        )
    blocks = {match[0] for name in body_parameters(model) if (match := BLOCK.match(name))}
    if spare := sorted(
        key
        for key in report.unused - set(unused)
        if (match := BLOCK.match(key)) and {match[0], f"{prefix}{match[0]}"} & blocks and not BUFFER.search(key)
    ):
        notes.append(f"Weights of the checkpoint that {type(model).__name__} does not use: {_listed(spare)}.")
    head = None if labelled else model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None and any(
        weight is head.weight and name in report.new for name, weight in model.named_parameters()
    ):
        notes.append("The checkpoint has no head that writes: a new one is trained and sent whole.")
    return tuple(notes)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def check_finite(model: nn.Module, name: str) -> None:
    """Raise Refused where a weight is NaN or infinite, with the layers where that is so."""
    broken = [key for key, weight in model.named_parameters() if weight.is_floating_point() and not _is_finite(weight)]
    if broken:
        remedy = f"not all of its weights are finite numbers: {list_some(broken, 1)} (a broken conversion or download?)"
        raise Refused("model", name, f"{remedy}; get the checkpoint again")


def _is_finite(weight: Tensor) -> bool:
    return not weight.numel() or all(bool(end.isfinite()) for end in weight.detach().aminmax())


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, ...]:
    """Return a note where the tokenizer has tokens without a row in the embedding.

    Raises Refused where the token that fills batches is one of them, or a classifier that needs such a token has none.
    """
    rows, pad = table_rows(model), tokenizer.pad_token_id
    if pad is None and hasattr(model, "score"):  # transformers' decoders find the last token of a text by it
        remedy = "its tokenizer has neither a pad token nor an end mark, and a classifier of this kind needs one to fill batches"
        raise Refused("model", name, f"{remedy}; set tokenizer.pad_token and save the tokenizer again")
    notes = []
    if hasattr(model, "score") and pad is not None and tokenizer.pad_token == tokenizer.unk_token:
        notes.append(f"The tokenizer has no pad token and no end mark: batches are filled with {tokenizer.pad_token}.")
    if rows is None or len(tokenizer) <= rows:
        return tuple(notes)
    if pad is not None and pad >= rows:
        raise Refused("model", name, missing_rows_remedy(len(tokenizer), rows, "its pad token"))
    sizes = f"The tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows"
    return (*notes, f"{sizes}: the tokens without one are not used.")


def table_rows(model: Any) -> int | None:
    """Return the number of tokens that a model knows, by the smaller of its embedding and its head that writes; None: not known."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tables = (input_embedding(model), getattr(head, "weight", None))
    return min((len(table) for table in tables if isinstance(table, Tensor)), default=None)


def missing_rows_remedy(tokens: int, rows: int, what: str) -> str:
    """Say that `what` has no row in the embedding, and how to mend that."""
    return (
        f"its tokenizer has {tokens} tokens, its embedding {rows} rows, none for {what}: take the tokenizer that belongs to the "
        "model, or call model.resize_token_embeddings(len(tokenizer)) and save both"
    )


def position_limit(model: nn.Module) -> int | None:
    """Return the tokens of the longest text that a model has positions for; None where nothing limits them.

    The configuration says it, except where a table of positions has fewer for use: RoBERTa and its relatives count from behind
    the row of the padding, OPT and BART from an offset.
    """
    config: Any = model.config
    limits = [getattr(config.get_text_config(), name, None) for name in ("max_position_embeddings", "max_seq_len")]
    limit = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
    for name, module in model.named_modules():
        named = re.search(r"^wpe$|pos(ition)?s?_|_pos", name.rpartition(".")[2])
        if (
            limit and named and isinstance(module, nn.Embedding) and module.num_embeddings >= limit
        ):  # not a vision tower's
            first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - int(first))
    return limit


def untie_adapted(model: PeftModel) -> tuple[str, ...]:
    """Give an adapted layer that shares its weight with another, as a head with the embedding, a copy of its own; return notes.

    Otherwise what is folded or merged into it would change the other one, too.
    """
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    untied = []
    for name, layer in peft_weights.lora_layers(model).items():
        weight = peft_weights.base_weight(layer)
        if uses[id(weight)] > 1:
            layer.get_base_layer().weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            untied.append(name)
    if not untied:
        return ()
    config: Any = model.get_base_model().config
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return (f"{_listed(untied)} shares its weights with another layer: it is adapted on a copy of its own.",)
