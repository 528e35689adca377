"""Groups of clients behind edges: who is in which group, what an edge does, and the root over edges.

`Hierarchy` is the value that a user writes. It builds a `Tree` (root, edges and the links between them in one process), or a
`RootServer` whose edges are regions of a deployment; a driver sees either as a `Coordinator`, as it sees a flat server. An
`Edge` is a server that is a client of another one. `grouping` says who trains with whom, `near_iid` searches good groups,
`regrouping` makes them again while a run goes on. `joint_plan` chooses the budgets of all groups together.
"""
