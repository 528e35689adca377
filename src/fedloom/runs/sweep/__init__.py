"""Sweeps: the same run with every combination of some values, as runs that can go on and that are compared at the end.

`grid` makes the runs and their folders, `processes` carries out several at once, `sweep` is what one calls.
"""
