"""Messages between server, regions and sites as bytes, and the checks of what comes from a network that nobody vouches for.

`messages` are the requests and replies, `answer` is the answer to a task, `container` the file format of all others, `checks`
the ranges of their numbers, `seeded_sides` what need not be sent. Imports `core`, `hierarchy` and the settings of `train`;
knows neither drivers nor sites.
"""
