"""A site: what runs beside the data.

`settings` is `site.toml`, `limits` and `consent` say whether a request may be obeyed; `worker` trains and evaluates, `deadline` ends
it; `site_privacy` says what noise protects and adds up what answers have cost, `site_noise` clips whole answers; `request_record` is
the signed record of all that was asked and sent, `answer_journal` remembers the answers; `sum_member` takes part in masked sums;
`site_secret` and `site_key` are the site's own; `worker_socket` brings messages, with the standard library alone; `export_sites`
writes a simulation's clients as sites. Nothing here knows Flower or the driver. What leaves a site are answers to tasks, counts, and
refusals.
"""
