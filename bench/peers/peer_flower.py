"""Flower: message-based `FedAvg`, simulated on Ray with two processors and one client on each.

`run_simulation` starts neither SuperLink nor SuperExec and is therefore cheaper than `flwr run`. Only the adapter is sent; an actor
keeps its model from one message to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from flwr.simulation import run_simulation
from torch import nn

from bench.peers import job
from bench.peers.clock import Clock

client_app = ClientApp()


@cache
def loaded(folder: str) -> tuple[job.Work, nn.Module]:
    """The model of this process."""
    work = job.read(Path(folder))
    return work, job.load_model(work)


@client_app.train()  # type: ignore[untyped-decorator]  # flwr is not installed here
def train(message: Message, context: Context) -> Message:
    """One task on whichever node was asked."""
    config = message.content["config"]
    work, model = loaded(str(config["folder"]))
    job.put(model, message.content["arrays"].to_torch_state_dict())
    losses = job.train(model, work, work.rounds[config["round"]][config["place"]])
    metrics = MetricRecord({"num-examples": 1, "losses": losses})
    return Message(RecordDict({"arrays": ArrayRecord(job.get(model)), "metrics": metrics}), reply_to=message)


class Replayed(FedAvg):
    """FedAvg in which the job says who trains; remembers the loss of every step."""

    def __init__(self, work: job.Work) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=work.settings.clients)
        self.work, self.losses = work, list[float]()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same message to as many nodes as the cohort has, each with its place in it."""
        nodes, _ = sample_nodes(grid, self.min_available_nodes, self.work.settings.cohort)
        common = {"folder": str(self.work.folder), "round": server_round - 1}
        for place, node in enumerate(nodes):
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({**common, "place": place})})
            yield Message(content, message_type=MessageType.TRAIN, dst_node_id=node)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The mean of the adapters."""
        held = list(replies)
        self.losses += [loss for reply in held for loss in reply.content["metrics"]["losses"]]
        return super().aggregate_train(server_round, held)


def run(folder: Path, clock: Clock) -> job.Report:
    """The job in Flower."""
    work, model = loaded(str(folder))
    strategy, server_app = Replayed(work), ServerApp()
    clock.mark("setup")

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        result = strategy.start(grid, ArrayRecord(job.get(model)), num_rounds=work.settings.rounds)
        job.put(model, result.arrays.to_torch_state_dict())

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app, client_app, work.settings.clients, backend_config=resources)
    clock.mark("train")
    return {"losses": job.by_round(work, strategy.losses), **job.score(model, work)}
