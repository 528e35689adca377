"""The audit of a run: what somebody who looks could learn from it, measured by attacks, beside what its noise promises.

`exchanges` collects what a server saw: what it sent, what came back, the versions. `labels`, `membership`, `token_span` and
`client_canaries` are the attacks: pure functions of such values, each with what chance alone would give. `run_audit` applies them to
a run, recorded or made small, adversary by adversary. `audit_page` writes what was found for somebody who is no engineer.

An attack that finds nothing proves nothing; it is an epsilon that bounds what any attack can find. No figure here holds a text, a
label or another value of anybody's data: only areas, shares, ranks and counts.
"""
