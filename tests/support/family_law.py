"""What must hold for every model family, as functions that measure one family: a figure for each fact, 0 or rounding where it holds.

A family is measured for each use that its kind has (labels, answers) and for each choice of layers (its default, all linear ones).
Where a library or fedloom refuses, the finding has the sentence; any other error is a failure of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, cut_factor
from fedloom.core.partial_depth import fold_layers
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import ClientState, Result, Task
from fedloom.data.examples import Examples
from fedloom.plan.depth import FixedDepth, check_blocks
from fedloom.train import export
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.engine import frozen_layers
from fedloom.train.evaluate import generate_answers
from fedloom.train.settings import PLAIN, Engine, LoRA, Training
from fedloom.train.tokenised import EncodedTexts, encode_texts
from fedloom.train.trainer import PeftTrainer
from tests.support.families import Family
from tests.support.tiny_models import toy_answers
from tests.support.tiny_runs import examples, lively, task_of

EXAMPLES, RANK, LOW_RANK, LABELS = 16, 4, 2, 2
FASTEST_GRADIENT = 1e6
"""A norm to clip at that no gradient has."""
GENERATED_TOKENS = 6
KEPT = replace(PLAIN, cache=10**8)
"""An engine that keeps the activations below the trained blocks."""
COMMON = replace(PLAIN, together=2)
"""An engine that trains two clients in one pass."""


@dataclass(frozen=True, slots=True)
class Case:
    """A family, whether it predicts labels or writes answers, and PEFT's word for the layers (None: the default)."""

    family: Family
    writes: bool
    targets: str | None

    def __str__(self) -> str:
        return f"{self.family.name}, {'answers' if self.writes else 'labels'}, {self.targets or 'default layers'}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was measured of one fact.

    Fields:
        case: where.
        fact: a key of `FACTS`, or "loads".
        gap: the figure (nan: refused or failed).
        refused: the sentence with which it is refused ("": it is not).
        failed: an error that is no refusal ("": none).
    """

    case: Case
    fact: str
    gap: float = math.nan
    refused: str = ""
    failed: str = ""

    @property
    def holds(self) -> bool:
        """Whether the figure is within its bar, or a sentence says why there is none."""
        return bool(self.refused) or (not self.failed and self.gap <= BARS.get(self.fact, 0.0))


@dataclass(slots=True)
class Scene:
    """A loaded case: the base without dropout, some texts, the adapter it starts with, and one with entries that do something."""

    case: Case
    folder: Path
    base: Base
    texts: EncodedTexts
    start: Adapter
    adapter: Adapter
    place: Path
    plain: dict[str, nn.Module] = field(default_factory=dict)

    def trainer(self, engine: Engine = PLAIN) -> PeftTrainer:
        """A trainer of two clients whose gradients are not clipped."""
        half = EXAMPLES // 2
        shards = {"a": tuple(range(half)), "b": tuple(range(half, EXAMPLES))}
        training = Training(learning_rate=1e-2, batch_size=4, clip=FASTEST_GRADIENT)
        return PeftTrainer(self.base, self.texts, shards, training, partial(simulated_secret, 0), engine)

    def inputs(self, rows: Sequence[int] = range(6)) -> dict[str, Tensor]:
        """A batch of these rows without its labels."""
        batch = self.texts.batch(rows, self.base.device)
        return {name: column for name, column in batch.items() if name != "labels"}

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Logits of a batch, where a text is not padded."""
        inputs = self.inputs()
        found: Tensor = model.eval()(**inputs).logits
        return found[inputs["attention_mask"].bool()] if found.shape[:2] == inputs["attention_mask"].shape else found

    def reload(self, folder: Path) -> nn.Module:
        """The model of this folder, of the class that the base has, as users load it."""
        kind: Any = type(self.base.model.get_base_model())
        more = {} if self.case.writes else {"num_labels": LABELS}
        with torch.random.fork_rng(devices=[]):
            model: Any = kind.from_pretrained(folder, **more)
        model.config.get_text_config().pad_token_id = self.base.tokenizer.pad_token_id
        uses_cache = getattr(self.base.model.get_base_model().config, "use_cache", None)
        if uses_cache is not None:  # transformers has none for linear attention alone
            model.config.use_cache = uses_cache
        return cast(nn.Module, model)


def cases_of(family: Family, all_linear: bool = True) -> Iterator[Case]:
    """The cases of a family: encoders write nothing."""
    for writes in (False,) if family.kind == "encoder" else (False, True):
        yield Case(family, writes, None)
        if all_linear:
            yield Case(family, writes, "all-linear")


def has_class(case: Case) -> bool:
    """Whether transformers has a class of this architecture for what the case is to do."""
    from transformers.models.auto import modeling_auto as auto

    labels, answers = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = case.family.config_class().model_type
    return kind in ({*answers, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES} if case.writes else labels)


def measure(case: Case, place: Path, facts: Sequence[str] = ()) -> tuple[list[Finding], Scene | None]:
    """Measure `facts`, keys of `FACTS` (none: all), of one case in an empty folder; also return the scene, where it loads."""
    try:
        scene = load_scene(case, case.family.save(place / "model"), place)
    except Refused as refused:
        return [Finding(case, "loads", refused=refused.remedy)], None
    except Exception as error:  # whatever it is, it is a failure to be told
        return [Finding(case, "loads", failed=f"{type(error).__name__}: {error}")], None
    chosen = [fact for fact in facts or FACTS if case.writes or fact != "generation"]
    return [Finding(case, "loads", 0.0), *(_finding(scene, fact) for fact in chosen)], scene


def load_scene(case: Case, folder: Path, place: Path) -> Scene:
    """Load a case."""
    base = load_case(case, folder)
    texts = encode_texts(_examples(case.writes), base.tokenizer, 40)
    start = initial_adapter(base, RANK)
    return Scene(case, folder, base, texts, start, _wide(start), place)


def _wide(adapter: Adapter, seed: int = 0) -> Adapter:
    """An adapter that changes the model, though not as much as its own weights do."""
    wide = lively(adapter, seed)
    return replace(wide, factors={name: Factor(f.down, 0.25 * f.up) for name, f in wide.factors.items()})


def load_case(case: Case, folder: Path, engine: Engine = PLAIN) -> Base:
    """Load the base of a case with slots of both ranks, without dropout, which draws other numbers in another pass."""
    base = load_base(str(folder), None if case.writes else LABELS, LoRA(case.targets), RANK, seed=3, engine=engine)
    base.slot(LOW_RANK)
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def _examples(writes: bool) -> Examples:
    if not writes:
        return examples(EXAMPLES)
    rows = toy_answers(EXAMPLES)
    answers = tuple(row["answer"] for row in rows)
    return Examples(tuple(row["instruction"] for row in rows), None, (0,) * EXAMPLES, ("all",), None, answers)


def _finding(scene: Scene, fact: str) -> Finding:
    try:
        return Finding(scene.case, fact, FACTS[fact](scene))
    except Refused as refused:
        return Finding(scene.case, fact, refused=refused.remedy)
    except Exception as error:  # whatever it is, it is a failure to be told
        return Finding(scene.case, fact, failed=f"{type(error).__name__}: {error}")


def relative_gap(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest number."""
    if one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return math.inf
    return float((one - other).abs().max() / other.abs().max())


# The facts -------------------------------------------------------------------------------------------------------------


def still_layers(scene: Scene) -> float:
    """Share of the adapted layers that three steps do not change: 1 where the loss is not a positive number."""
    return _still(_trained(scene, scene.base, 3))


def depth_gap(scene: Scene) -> float:
    """Largest relative gap between the logits of a pass from the first trained block on and of a plain pass, at two depths."""
    gaps = []
    for depth in _depths(scene):
        start = _task(scene, depth).start
        scene.base.put(start.train, fold=start.fold)
        expected = scene.logits(scene.base.model)
        split = frozen_layers.split_layers(scene.base, [*start.train.factors])
        if split is not None and split.form is not None:
            with torch.no_grad():
                hidden = split.frozen_output(scene.inputs())
            with split.starting_from(hidden):
                gaps.append(relative_gap(scene.logits(scene.base.model), expected))
    return max(gaps, default=0.0)


def depth_gradient_gap(scene: Scene) -> float:
    """Largest relative gap between the gradients of full depth and of partial depth from kept activations."""
    depths, full = _depths(scene), _gradients(scene, _task(scene, None))
    return max(_gradient_gap(_gradients(scene, _task(scene, depth), KEPT), full) for depth in depths)


def kept_activations_gap(scene: Scene) -> float:
    """Largest difference between adapters trained with activations that are kept, and that there is no room for."""
    task, gaps = _task(scene, _depths(scene)[0], steps=3), []
    fresh, kept = scene.trainer(replace(PLAIN, cache=1)), scene.trainer(KEPT)
    ((expected, _),) = fresh.train([(task, ClientState())])
    for _ in range(2):
        ((found, _),) = kept.train([(task, ClientState())])
        gaps += [float((f.up - expected.adapter.factors[n].up).abs().max()) for n, f in found.adapter.factors.items()]
    return max(gaps)


def common_pass_gap(scene: Scene) -> float:
    """Largest relative gap between the gradients of two clients, of two ranks, in one pass and one after the other."""
    pairs = [(task, ClientState()) for task in _two_tasks(scene)]
    alone, common = (scene.trainer(engine).train(pairs) for engine in (PLAIN, COMMON))
    return max(_gradient_gap(_slopes(one), _slopes(other)) for (_, one), (_, other) in zip(common, alone, strict=True))


def bfloat16_gap(scene: Scene) -> float:
    """Relative gap between the first loss with frozen layers in bfloat16 and in float32; infinite where a layer stays as it was."""
    half = _trained(scene, load_case(scene.case, scene.folder, replace(PLAIN, bfloat16=True)), 2)
    exact = _trained(scene, scene.base, 1)
    return math.inf if _still(half) else abs(half.metrics["first_loss"] / exact.metrics["first_loss"] - 1.0)


def export_gap(scene: Scene) -> float:
    """Largest relative gap between our logits and those of PEFT with the exported adapter, at two ranks."""
    from peft import PeftModel

    gaps = []
    for rank in (RANK, LOW_RANK):
        adapter = export.truncate_adapter(scene.adapter, rank)
        folder = export.save_adapter(scene.base, adapter, ("no", "yes"), scene.place / f"rank-{rank}")
        loaded = PeftModel.from_pretrained(scene.reload(scene.folder), str(folder))  # type: ignore[arg-type]
        scene.base.put(adapter)
        gaps.append(relative_gap(scene.logits(loaded), scene.logits(scene.base.model)))
    return max(gaps)


def merge_gap(scene: Scene) -> float:
    """Relative gap between the logits of the adapter and of the merged folder."""
    merged = _merged(scene)
    scene.base.put(scene.adapter)
    return relative_gap(scene.logits(merged), scene.logits(scene.base.model))


def generation_gap(scene: Scene) -> float:
    """Number of answers that differ from those which transformers generates with the merged folder, one by one."""
    merged: Any = _merged(scene).eval()
    rows, starts = range(4), scene.texts.answer_starts or ()
    written = generate_answers(scene.base, scene.adapter, scene.texts, rows, GENERATED_TOKENS)
    wrong = 0
    for i in rows:
        request = torch.tensor([scene.texts.ids[i][: starts[i]]])
        mask = torch.ones_like(request)
        found = merged.generate(
            input_ids=request, attention_mask=mask, max_new_tokens=GENERATED_TOKENS, do_sample=False
        )
        answer = str(scene.base.tokenizer.decode(found[0, request.shape[1] :], skip_special_tokens=True))
        wrong += answer.strip() != written[i]
    return float(wrong)


def shares_passes(scene: Scene) -> bool:
    """Whether clients are trained in one pass where the engine may: some models do not keep their rows apart."""
    return len(scene.trainer(COMMON).groups([(task, ClientState()) for task in _two_tasks(scene)])) == 1


def begins_at_trained_blocks(scene: Scene) -> bool:
    """Whether a pass of depth 1 begins at the first trained block: some blocks hand on more than hidden states."""
    if not scene.base.shape().depths:
        return False
    split = frozen_layers.split_layers(scene.base, [*_task(scene, 1).start.train.factors])
    return split is not None and split.form is not None


FACTS: Mapping[str, Callable[[Scene], float]] = {
    "trains": still_layers,
    "depth": depth_gap,
    "depth gradients": depth_gradient_gap,
    "kept activations": kept_activations_gap,
    "common pass": common_pass_gap,
    "bfloat16": bfloat16_gap,
    "export": export_gap,
    "merge": merge_gap,
    "generation": generation_gap,
}
"""What is measured, by name."""

BARS: Mapping[str, float] = {
    "depth gradients": 1e-3,
    "common pass": 1e-3,
    "bfloat16": 0.1,
    "export": 1e-5,
    "merge": 1e-5,
}
"""Largest gap of a fact; 0 for the others. Gradients of these wide random models lose digits; where one is wrong it is by half."""


def _two_tasks(scene: Scene) -> list[Task]:
    low = {name: cut_factor(factor, LOW_RANK) for name, factor in _wide(scene.start, 1).factors.items()}
    return [task_of(scene.adapter, "a", 1, 1), task_of(Adapter(low, scene.adapter.dense), "b", 1, 2)]


def _trained(scene: Scene, base: Base, steps: int) -> Result:
    task = task_of(scene.start, steps=steps)
    ((result, _),) = replace(scene.trainer(), base=base).train([(task, ClientState())])
    return result


def _still(result: Result) -> float:
    if not 0 < result.metrics["loss"] < math.inf:
        return 1.0
    factors = result.adapter.factors.values()
    return sum(not bool(factor.up.any()) for factor in factors) / len(factors)


def _depths(scene: Scene) -> tuple[int, ...]:
    """Two depths below the full one. Raises Refused where the model has none."""
    shape = scene.base.shape()
    check_blocks(FixedDepth(1), shape)
    return 1, max(shape.depths.values()) - 1


def _task(scene: Scene, depth: int | None, steps: int = 1) -> Task:
    task = task_of(scene.adapter, steps=steps)
    start = fold_layers(task.start, scene.base.shape().untrained_modules(task.start.train.factors, depth))
    return replace(task, start=start, budget=replace(task.budget, depth=depth))


def _gradients(scene: Scene, task: Task, engine: Engine = PLAIN) -> dict[str, Tensor]:
    ((_, state),) = scene.trainer(engine).train([(task, ClientState())])
    return _slopes(state)


def _slopes(state: ClientState) -> dict[str, Tensor]:
    """A tenth of each gradient: AdamW's first moment after one step."""
    return {name: moment["exp_avg"] for name, moment in state.moments.items()}


def _gradient_gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest norm of a difference over the norm of the gradient, or over a thousandth of the largest one."""
    largest = max(float(slope.norm()) for slope in expected.values())
    sizes = {name: max(float(expected[name].norm()), 1e-3 * largest) for name in found}
    return max(float((slope - expected[name]).norm()) / sizes[name] for name, slope in found.items())


def _merged(scene: Scene) -> nn.Module:
    if "merged" not in scene.plain:
        folder = export.save_merged(scene.base, scene.adapter, ("no", "yes"), scene.place / "merged")
        scene.plain["merged"] = scene.reload(folder)
    return scene.plain["merged"]
