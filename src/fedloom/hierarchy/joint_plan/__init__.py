"""Budgets for all groups together: how often each averages, how deep and at which rank it trains, and for how many steps.

`JointPlan` is the budget rule of the root. It turns what edges reported into a `GroupState` for each group (`group_cost` says what a
round costs it), and asks one rule for all of them. A rule is one file: `GradientScore`, the default, and `BestRoundTime` let
groups end together, `LossRate` is for groups that do not wait for each other. Rules that were tried and are not for use are in
`experiments/joint_rules.py`.
"""
