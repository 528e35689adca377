"""How a site's held-out examples do under the run's last model, in counts and sums. No text is told, and no example by itself."""

from __future__ import annotations

from fedloom.core.errors import Refused
from fedloom.core.types import ClientState
from fedloom.data.partition import Shard
from fedloom.deploy.messages.messages import EvaluateRequest, EvaluateResult
from fedloom.runs.final_scores import count_commonest
from fedloom.train.base_model import Base
from fedloom.train.evaluate import AnswerScores, Scores, score
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.objective import personal_adapter


def sat(base: Base, texts: EncodedTexts, shard: Shard, exam: EvaluateRequest, local: ClientState) -> EvaluateResult:
    """The marks, as a simulation's client gets them (`clientscores`); `local` is what stayed here of the last accepted task.

    Raises Refused where nothing is held out. Nothing changes here.
    """
    if not shard.held_out:
        raise Refused("held_out", 0, "this site holds no example out, so there is nothing to score")
    found = score(base, personal_adapter(exam.start, local), texts, shard.held_out, exam.start.fold)
    asked, right, loss = _counted(found)
    if base.labels is None:
        _, base_right, base_loss = _counted(score(base, None, texts, shard.held_out))
    else:
        trained, held_out = ([texts.labels[i] for i in part] for part in (shard.train, shard.held_out))
        base_right, base_loss = count_commonest(trained, held_out), 0.0
    return EvaluateResult(shard.client, len(shard.held_out), asked, right, loss, base_right, base_loss)


def _counted(found: Scores | AnswerScores) -> tuple[int, int, float]:
    """Predictions, those that are right, the sum of their cross-entropies."""
    loss = float(found.losses.double().sum())
    if isinstance(found, AnswerScores):
        return int(found.tokens.sum()), int(found.hits.sum()), loss
    return len(found.labels), int((found.predicted == found.labels).sum()), loss
