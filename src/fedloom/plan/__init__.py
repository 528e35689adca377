"""HOW MUCH each client may do in its next task: rules for its rank, its local steps and its depth.

`budget.Plan` puts a rule for the rank (`rank`), a number of steps and a rule for the depth (`depth`) together into a
`core.policies.BudgetRule`. `client_cost` estimates what a task takes a client. The room imports `core` only.

To add a rule, add one frozen dataclass to `rank` or `depth` that is called with (profile, fleet) or (profile, fleet, budget). Plans
for groups of clients are in `hierarchy.joint_plan`.
"""

from __future__ import annotations
