"""Building blocks of aggregators: helpers that more than one method uses, and no method.

`merge_terms` spells a `Merge` out as a linear combination, `factor_space` adds factors, `product_space` adds products and cuts them
to a rank. `wrapper`, `server_optimiser` and `client_changes` are what wrappers share. Imports `core` only, never a method.
"""
