"""Workers: local processes or Ray actors that train tasks, each with the base model already in memory.

- `worker`: the setting `Workers`, and the protocols that kinds of workers share.
- `pool`: `open_pool` gives a trainer that divides its tasks over workers; it alone knows the kinds.
- `local_processes`, `ray_actors`: the two kinds. `shared_memory`: objects as bytes for them, tensors mapped from one file.

The results do not depend on who trains (law 9). This package imports neither transformers nor peft: a trainer comes as an object.
A new kind of worker is a module with a `WorkerFactory`, a way to say so in `Workers.parse`, and a line in `pool._worker_factory`.
"""
