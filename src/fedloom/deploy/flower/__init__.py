"""Flower as the transport of a deployment, and the processes that it takes at the server and at a site.

At the server `serve` keeps SuperLink, `gate` and SuperExec alive (`supervisor`, `server_processes`), lets sites in (`keys`,
`superlink`, `register_keys`), and submits the ServerApp (`server_app`), which leaves its `app_outcome`. At a site `join` keeps
`supernode`, `executor` and the worker alive. Only `grid`, `server_app`, `executor`, `supernode` and `register_keys` import
flwr; the rest knows messages as bytes.
"""

from __future__ import annotations
