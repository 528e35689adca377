"""The server's side of a deployment, whatever carries its messages.

`driver` is the loop around the core, and where to begin; `nodes` is its table of nodes and messages in flight; `reply_events`
turns bytes into events; `evaluation` is the held-out evaluation by the clients; `config` what the server was asked to do;
`status` what it shows. May import the messages and `runs`; knows neither Flower nor the site.
"""
