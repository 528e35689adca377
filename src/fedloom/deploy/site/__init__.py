"""A site: what runs beside the data.

`settings` is `site.toml` and the question whether a request may be obeyed; `worker` trains and evaluates; `answer_journal`
remembers its answers; `worker_socket` brings it messages, with the standard library alone; `export_sites` writes a
simulation's clients as sites. Nothing here knows Flower or the driver. What leaves a site are answers to tasks, counts, and refusals.
"""
