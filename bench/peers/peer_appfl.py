"""APPFL: its virtual-clock driver in synchronous rounds, `SimServerAgent` and 20 `SimClientAgent`, at its fastest settings.

`optimize_memory` is off everywhere (its calls of `gc.collect` would cost more than the training), the base is read once and not
once for each agent, and agents exchange the adapter alone. `lean=False` is APPFL as it is shipped: none of the three.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

# image quality, not used here; it needs torchvision, of which there is no build for torch without CUDA
sys.modules["piq"] = ModuleType("piq")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from appfl.agent import SimClientAgent, SimServerAgent  # noqa: E402
from appfl.vsim import ClientProfile, SyncSimDriver, VsimLogger  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.peers import job  # noqa: E402
from bench.peers.clock import Clock  # noqa: E402

LOSSES: list[float] = []


class Net(nn.Module):
    """One tensor in (ids, mask and segments, stacked), logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, stacked: Tensor) -> Tensor:
        """Logits of a batch."""
        ids, mask, segments = stacked
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits
        return logits


class LeanNet(Net):
    """Its state, which is what travels, is the adapter alone."""

    def state_dict(self, *given: Any, **named: Any) -> Any:
        """What is sent."""
        return OrderedDict((name, weight.detach()) for name, weight in job.trained(self).items())

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """What was received."""
        job.put(self, state_dict)


class Loss(nn.CrossEntropyLoss):
    """Cross-entropy that remembers the loss of every step."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean over the batch."""
        loss = super().forward(input, target)
        from bench.peers.peer_appfl import LOSSES as shared  # APPFL executes this file anew for every agent

        shared.append(float(loss.detach()))
        return loss


class Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A client's batches; each pass of the loader is its next task."""

    def __init__(self, work: job.Work, client: str) -> None:
        self.work, self.tasks, self.turn = work, [task for task in work.tasks if task.client == client], -1

    def __len__(self) -> int:
        return self.work.settings.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        self.turn += step == 0
        batch = job.take(self.work.train, self.tasks[self.turn].batches[step])
        return torch.stack([batch[n] for n in ("input_ids", "attention_mask", "token_type_ids")]), batch["labels"]


class Replayed(SyncSimDriver):
    """The driver in which the job says who trains."""

    cohorts: list[list[str]]

    def _select_participants(self) -> list[str]:
        return self.cohorts[self._round]


@cache
def loaded(folder: str) -> LeanNet:
    """The model, once a process."""
    return LeanNet(job.load_model(job.read(Path(folder))))


def make_lean(folder: str) -> Net:
    """A copy for an agent."""
    from bench.peers.peer_appfl import loaded as shared  # as above

    return copy.deepcopy(shared(folder))


def make_plain(folder: str) -> Net:
    """A model of its own for an agent."""
    return Net(job.load_model(job.read(Path(folder))))


def accuracy(true: Any, predicted: Any) -> float:
    """The metric that the trainer asks for."""
    return float((np.argmax(predicted, 1) == true).mean())


def config(work: job.Work, lean: bool) -> dict[str, Any]:
    """The settings of server and clients in APPFL's words."""
    settings, here = work.settings, __file__
    memory = {"optimize_memory": not lean}
    train = {
        "trainer": "VanillaTrainer",
        "mode": "step",
        "num_local_steps": settings.steps,
        "train_batch_size": None,  # the data set gives whole batches
        "train_data_shuffle": False,
        "optim": "AdamW",
        "optim_args": {"lr": settings.rate, "weight_decay": 0.0},
        "loss_fn_path": here,
        "loss_fn_name": "Loss",
        "metric_path": here,
        "metric_name": "accuracy",
        "clip_grad": True,
        "clip_value": settings.clip,
        "clip_norm": 2,
        "device": "cpu",
        **memory,
    }
    server = {
        "num_clients": settings.clients,
        "num_global_epochs": settings.rounds,
        "scheduler": "SyncScheduler",
        "scheduler_kwargs": memory,
        "aggregator": "FedAvgAggregator",
        "aggregator_kwargs": {"client_weights_mode": "equal", **memory},
        **memory,
    }
    model = {
        "model_path": here,
        "model_name": "make_lean" if lean else "make_plain",
        "model_kwargs": {"folder": str(work.folder)},
    }
    client = {"train_configs": train, "model_configs": model, **memory}
    return {"client_configs": client, "server_configs": server}


def run(folder: Path, clock: Clock, lean: bool = True) -> job.Report:
    """The job in APPFL."""
    work = job.read(folder)
    settings = config(work, lean)
    names = sorted({task.client for task in work.tasks})
    names += [f"idle{n}" for n in range(work.settings.clients - len(names))]
    server = SimServerAgent(settings)
    agents = [
        SimClientAgent(settings["client_configs"], client_id=name, client_dataset=Batches(work, name)) for name in names
    ]
    driver = Replayed(
        server,
        agents,
        {name: ClientProfile() for name in names},
        participants_per_round=work.settings.cohort,
        logger=VsimLogger(),
        base_step_time=0.1,
        target_rounds=work.settings.rounds,
    )
    driver.cohorts = [[task.client for task in cohort] for cohort in work.rounds]
    clock.mark("setup")
    driver.run()
    clock.mark("train")
    server.model.load_state_dict(server.get_parameters(serial_run=True), strict=False)
    return {"losses": job.by_round(work, LOSSES), **job.score(server.model.model, work)}
