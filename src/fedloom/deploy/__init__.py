"""Deployment: the same runs on real machines, with one process at the server and one long-lived worker at each site.

`start` carries a run out over any `link.Transport`; `flower` is the one transport there is. This room stands above `runs` and below
`cli`: it may import everything but `cli`; only `deploy.flower` imports flwr.

The way of a site's reply to the next version, file by file:

1. `site/worker.py` trains the task (`train/trainer.py`), applies the codec (`core/transfer.py`), encodes the answer
   (`messages/answer.py`), and records these bytes in `site/answer_journal.py` before it hands them out;
2. `site/worker_socket.py` gives the bytes to `flower/executor.py`, which sends them through Flower;
3. `flower/grid.py` collects them at the server, as a `RawReply` of `link.py`;
4. `server/driver.py` takes them up in its turn, and `server/reply_events.py` decodes them (`messages/messages.py`,
   `messages/answer.py`) into an `UpdateArrived` event, or refuses them;
5. `core/server.py` validates the answer (`core/validate_answer.py`), collects it, and when the schedule says so merges it with
   the others by the aggregator, layer by layer where clients train to different depths (`core/partial_depth.py`): a new version;
6. its commands come back to the driver: a checkpoint is saved, then the next tasks are sent (`messages/seeded_sides.py` leaves
   out what the site can compute itself).
"""
