"""The same run on real machines, over Flower: one process for the server, one long-lived worker at each site.

Only `grid`, `serverapp`, `executor` and `node` import flwr; the rest knows messages as bytes.
"""

from __future__ import annotations
