"""The adapter that a run begins from, `Run.start`: of an earlier run, or any LoRA folder of PEFT, at the rank of this run.

Each layer is decomposed anew: its leading directions are the first model, so a client of small rank receives the best part. What
is beyond the server's rank goes into the fold of a method that has one, and is cut off elsewhere, which a note says. Directions that
are missing begin as PEFT's do, with up = 0 and a random `down`: the model is the same, and each direction can learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.files import read_json
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import (
    Adapter,
    Factor,
    compact_with_fold,
    cut_factor,
    energy_spectrum,
    initial_factor,
    revive,
    server_rank,
    truncate,
)
from fedloom.core.policies import aggregator_layers
from fedloom.core.seeds import derive
from fedloom.core.text import list_some
from fedloom.core.types import Model
from fedloom.runs.manifest import short_paths
from fedloom.runs.run import Run
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.checkpoint import same_names
from fedloom.train.peft_folder import StoredAdapter, read_peft_folder

NAMED = 3
"""Layers or labels that a note lists."""


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """Adapter that a run begins from.

    Fields:
        adapter: at the server's rank, directions sorted by energy, each able to learn.
        rest: the directions beyond this rank, of the layers that have any.
        facts: what the manifest says of it: its name, the sha256 of its numbers, its rank, the run that made it.
        notes: what a reader of the figures has to know.
    """

    adapter: Adapter
    rest: Adapter
    facts: Mapping[str, object]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """Run that made an adapter.

    Fields:
        model: name of its base model.
        weights: fingerprint of the base model's weights ("": not known).
        bfloat16: whether these were in bfloat16.
        labels: names of its labels, in order.
        run_hash: hash of its settings ("": not known).
        private: whether its clients or their records were protected by noise.
    """

    model: str
    weights: str
    bfloat16: bool
    labels: tuple[str, ...]
    run_hash: str
    private: bool


def first_version(run: Run, base: Base, start: StartAdapter | None) -> Model:
    """Return the model of version 0. A method with a fold keeps there what is beyond the server's rank."""
    if start is None:
        return run.aggregator.init(initial_adapter(base, run.plan.rank.largest))
    model = run.aggregator.init(start.adapter)
    if not start.rest.factors or not has_fold(run):
        return model
    fold = compact_with_fold(start.rest, model.fold)
    return replace(model, fold=Adapter(fold.factors))


def has_fold(run: Run) -> bool:
    """Whether the run's method adds what it learns to the frozen base, at any rank."""
    return any(getattr(layer, "has_fold", False) for layer in aggregator_layers(run.aggregator))


def start_folder(run: Run) -> Path | None:
    """Return the folder of the adapter that the run begins from; None where it begins anew. Raises Refused where there is none."""
    if run.start is None:
        return None
    folder = Path(run.start)
    if not folder.is_dir():
        remedy = "there is no such folder; give a run folder, or a LoRA folder that PEFT has written (download one of the hub)"
        raise Refused("start", run.start, remedy)
    place = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if _is_run(place):
        raise Refused("start", run.start, "this run holds no adapter: it made no version; give another one")
    return place


def load_start(run: Run, base: Base, names: Sequence[str]) -> StartAdapter | None:
    """Load the adapter that the run begins from; None where it begins anew. `names` are its labels.

    Raises Refused for a folder that holds no such adapter, or one of another base model.
    """
    place = start_folder(run)
    if place is None:
        return None
    earlier, stored = _earlier_run(place), read_peft_folder(base, place, "start")
    notes = [*_base_notes(run, base, stored, earlier), *_layer_notes(stored), *_spent_notes(earlier)]
    fresh = initial_adapter(base, run.plan.rank.largest)
    dense, head_notes = _head(fresh.dense, stored.adapter.dense, _label_names(place, earlier), names)
    rank = max(
        run.plan.rank.largest, *(getattr(layer, "rank", None) or 1 for layer in aggregator_layers(run.aggregator))
    )
    adapter, rest = at_rank(fresh, stored.adapter, rank, run.seed)
    if rest.factors and not has_fold(run):
        cut = f"The start adapter was truncated from rank {server_rank(stored.adapter)} to {rank}"
        notes.append(
            f"{cut}: {100 * (1 - _energy(rest) / (_energy(stored.adapter) or 1.0)):.4g} % of its energy is left."
        )
    name = short_paths(str(Path(str(run.start)).resolve()))
    facts = {"adapter": name, "sha256": fingerprint(stored.adapter), "rank": server_rank(stored.adapter)}
    facts |= {"run_hash": earlier.run_hash} if earlier and earlier.run_hash else {}
    first = f"Warm start from the adapter {name}: version 0 is this adapter, not an untrained model."
    return StartAdapter(Adapter(adapter.factors, dense), rest, facts, (first, *notes, *head_notes))


# The parts of it ------------------------------------------------------------------------------------------------------


def _earlier_run(folder: Path) -> EarlierRun | None:
    """Return the run that made the adapter in this folder, whose manifest lies above it; None where no run of ours did."""
    path = folder.resolve().parent / "manifest.json"
    if not _is_run(path.parent):
        return None
    try:
        about = read_json(path)
        model, labels = about["model"]["name"], about["partition"]["label_names"]
        engine = about["run"].get("engine") or {}
        weights, run_hash = about.get("base_weights", ""), about.get("run_hash", "")
        bfloat16, private = bool(engine.get("bfloat16")), bool(about["run"].get("privacy"))
        return EarlierRun(str(model), str(weights), bfloat16, tuple(labels), str(run_hash), private)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        remedy = f"its manifest.json cannot be read ({type(error).__name__}); give its adapter as a folder of its own"
        raise Refused("start", str(folder), remedy) from error


def _is_run(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and (folder / "metrics.jsonl").is_file()


def _base_notes(run: Run, base: Base, stored: StoredAdapter, earlier: EarlierRun | None) -> list[str]:
    """Compare the base models, by their weights or at least by name. Raises Refused where the weights are others."""
    rounded = bool(run.engine and run.engine.bfloat16)
    own = base.fingerprint(stored.adapter.factors)
    if own and earlier and earlier.weights and earlier.bfloat16 == rounded:
        if own != earlier.weights:
            remedy = f"it was trained on {earlier.model}, whose weights are others than those of {base.name}"
            raise Refused("start", run.start, f"{remedy}; give the same base model, or an adapter of this one")
        return []
    name = earlier.model if earlier else stored.base
    note = f"The adapter was trained on {short_paths(name)}, and is used on {short_paths(base.name)}: the names were compared,"
    return [] if name == base.name else [f"{note} not the weights."]


def _layer_notes(stored: StoredAdapter) -> Iterator[str]:
    if stored.missing:
        names = list_some(stored.missing, NAMED)
        yield f"{len(stored.missing)} layers are not in the adapter that the run began from, and began at zero: {names}."


def _spent_notes(earlier: EarlierRun | None) -> Iterator[str]:
    if earlier and earlier.private:
        yield (
            "The run that made that adapter was private, and has a ledger of its own: what it told of a client that is here too "
            "is not in the figures of this run, and adds to them."
        )


def _label_names(place: Path, earlier: EarlierRun | None) -> tuple[str, ...]:
    """Return the labels of the adapter's head, in order; () where nothing says them."""
    if earlier:
        return earlier.labels
    for path in (place / "config.json", place / "base" / "config.json"):
        try:
            found = read_json(path.resolve()).get("id2label") or {}  # a folder of the hub's cache is made of links
            names = [str(found[str(number)]) for number in range(len(found))]
        except (OSError, ValueError, LookupError, AttributeError):
            continue
        if names and any(name != f"LABEL_{number}" for number, name in enumerate(names)):
            return tuple(names)
    return ()


def _head(
    fresh: Mapping[str, Tensor], held: Mapping[str, Tensor], theirs: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the first head, and notes: the adapter's where it is for the same labels, its rows in the order of `names`."""
    if not fresh:
        return {}, []
    lacks = [name for name in fresh if name not in held or held[name].shape != fresh[name].shape]
    new = "The head begins anew, untrained"
    if lacks:
        return dict(fresh), [f"{new}: the adapter has none of this shape ({list_some(lacks, NAMED)})."]
    same = same_names(names, theirs)  # in the order of the adapter's rows
    if theirs and same is None:
        return dict(fresh), [f"{new}: that of the adapter is for other labels ({list_some(sorted(theirs), NAMED)})."]
    if same is None:
        return {name: held[name] for name in fresh}, [
            f"The adapter does not say its labels: its head was taken as one for {', '.join(names)}, in this order."
        ]
    order = [same.index(name) for name in names]
    last = [name for name, tensor in fresh.items() if len(tensor) == len(names)][-1].rpartition(".")[0]
    return {name: held[name][order] if name.rpartition(".")[0] == last else held[name] for name in fresh}, []


def at_rank(fresh: Adapter, held: Adapter, rank: int, seed: int) -> tuple[Adapter, Adapter]:
    """Return the leading directions at this rank, for the layers of `fresh`, and the directions beyond it."""
    first, rest = {}, {}
    for name, like in fresh.factors.items():
        whole, drawn = held.factors.get(name), derive(seed, "start", name)
        if whole is None or not bool(whole.up.any() and whole.down.any()):
            first[name] = initial_factor(like, rank, drawn)
            continue
        whole = truncate(whole, whole.rank)
        first[name] = revive(cut_factor(whole, rank), rank, drawn)
        if whole.rank > rank:
            rest[name] = Factor(whole.down[rank:], whole.up[:, rank:])
    return Adapter(first), Adapter(rest)


def _energy(adapter: Adapter) -> float:
    """Return the sum of the squared singular values of all layers."""
    return sum(float(energy_spectrum(factor).sum()) for factor in adapter.factors.values())
