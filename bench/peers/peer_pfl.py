"""pfl-research: `SimulatedBackend` with `FederatedAveraging`, in one process, without its evaluations of each client."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from bench.peers import job
from bench.peers.clock import Clock


class Net(nn.Module):
    """The model with the two methods that pfl asks for; remembers the loss of every step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.losses = model, list[float]()

    def loss(self, **batch: Tensor) -> Tensor:
        """The training loss."""
        loss: Tensor = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def metrics(self, **batch: Tensor) -> dict[str, Any]:
        """Never called: clients are not evaluated."""
        raise NotImplementedError


class Batches(Dataset):
    """One task: batches of the shared tokens, each padded to its own longest."""

    def __init__(self, work: job.Work, task: job.Task) -> None:
        super().__init__((), user_id=task.client)
        self.work, self.task = work, task

    def __len__(self) -> int:
        return sum(map(len, self.task.batches))

    def iter(self, batch_size: int | None) -> Iterator[job.Batch]:
        """The batches of the task, whatever the size asked for."""
        for ids in self.task.batches:
            yield job.take(self.work.train, ids)


class NeverEvaluated(FederatedAveraging):
    """pfl evaluates a client before and after training in round 0 at least; nobody else here does, so it is left out."""

    def get_next_central_contexts(self, model: Any, iteration: int, *rest: Any) -> Any:
        """As pfl plans them, with the evaluation switched off."""
        from dataclasses import replace

        contexts, model, metrics = super().get_next_central_contexts(model, iteration, *rest)
        return contexts and tuple(replace(c, do_evaluation=False) for c in contexts), model, metrics


def run(folder: Path, clock: Clock) -> job.Report:
    """The job in pfl."""
    work = job.read(folder)
    settings, net = work.settings, Net(job.load_model(work))
    tasks = iter(work.tasks)
    data = FederatedDataset(lambda task: Batches(work, task), lambda: next(tasks))
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    model = PyTorchModel(net, job.optimiser, torch.optim.SGD(weights, lr=1.0))
    backend = SimulatedBackend(training_data=data, val_data=data)
    clock.mark("setup")
    with contextlib.redirect_stdout(io.StringIO()):
        NeverEvaluated().run(
            NNAlgorithmParams(
                central_num_iterations=settings.rounds,
                evaluation_frequency=settings.rounds,
                train_cohort_size=settings.cohort,
                val_cohort_size=0,
            ),
            backend,
            model,
            NNTrainHyperParams(
                local_num_epochs=None,
                local_num_steps=settings.steps,
                local_learning_rate=settings.rate,
                local_batch_size=settings.batch,
                local_max_grad_norm=settings.clip,
            ),
        )
    clock.mark("train")
    return {"losses": job.by_round(work, net.losses), **job.score(net.model, work)}
