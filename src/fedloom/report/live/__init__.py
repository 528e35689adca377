"""The live page of a run: `fedloom watch DIR` serves one that follows the run folder, or the folder of a deployment.

`log_tail` reads a log while it is written. `fleet` follows the clients and the stream of events in the lines of `trace.jsonl`, and
`live_state` the curves, totals and texts in those of `metrics.jsonl`, in memory that does not grow with the lines. `server` polls the
folder, and sends what has changed to browsers on this machine as server-sent events. `page.html`, `page.css` and `page.js` show it.
"""
