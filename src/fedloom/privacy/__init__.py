"""Privacy that is accounted: which noise is added to which sum, where it comes from, what it has cost, and sums nobody looks into.

`Private` is what a run promises. For clients, `private_merge` stands between answers and aggregator at whoever merges single clients
(a server, or the edges of a tree), and `correlated_noise` is its noise over several versions. For records, `record_draws` says which
rows are in a step of a site's training, and with which noise. `accounting` adds up what was released, `ledger` keeps it on the disk,
before anything goes out. `secret_noise` makes all of it from secrets (`secret_file`), and `sealing` keeps exact answers unreadable
where they must be stored. `secure_sum` is the protocol by which members of a group are added up and nobody sees one of them.

The room imports torch and the policies; `cryptography`, `pycryptodome` and `dp-accounting` are imported where they are used. It knows
no clock and no network: secrets, keys and randomness are arguments.
"""

from __future__ import annotations
