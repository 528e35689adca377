"""Trackers: they pass the figures of a run on to programs that show many runs side by side.

A run always writes its figures as JSON lines, `metrics.jsonl`. A tracker gets those of them that are about the whole run: held-out
evaluation, training loss, traffic, staleness. It gets no example, no generated text, no label and no name of a client. One tracker
is one file here; `tracker` has the interface, and what all of them have in common.
"""
