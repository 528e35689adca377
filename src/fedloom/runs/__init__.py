"""A run from its settings to its folder: `Run` -> `prepare` -> `Job` -> `execute` -> run folder.

`run` and `run_file` are the settings, `prepare` puts the parts together, `job` is what it builds, `execute` carries it out. What
happens is read once, by `observation`; `metrics` and `slot_usage` count it, `trace` writes every step, `final_scores` scores the last
model for each client. `checkpoint` and `resume` let a killed run go on to the same bytes, `replay` repeats a recorded one without
training, and `manifest` describes a run and compares two.
"""
