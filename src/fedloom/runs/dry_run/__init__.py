"""The dry run: what a run will cost, found out before it starts.

`untrained` carries the run out without its training: tasks, messages, virtual time. `step_times` trains and scores a little, to
measure what that takes on this machine. `cost_estimate` puts both together, and is what one calls.
"""
