"""Data: where examples come from, how they are divided over clients, and how uneven the clients are.

Sources (`table`, `instructions`, `tickets`, `office_tasks`, `corrupted`) give a `Split` of `Examples` (`examples`). All tables come
in by one way: `file_formats` reads files (`delimited` those of text), `database` queries, `raw_table` what is in memory, and `cells`
says what a cell means, whatever it came from.
Partitions (`partition`, and `skew` for axes that are measured with `text_measures`) divide the training examples over clients.
`client_summary`, `private_histogram` and `heterogeneity` tell how uneven clients are, from counts that hold no text.

A new partition is a frozen dataclass with `split(examples, seed)`, as the protocol `partition.Partition` says. It goes to
`partition`, or to a file of its own if it brings a method of its own, and needs a line in `fedloom/__init__.pyi`; a run then takes
it as `Run(partition=...)`. No test finds partitions by itself: add it to `partitions` in `tests/data/test_partition.py`, whose tests
hold of every partition there, or give it a test file of its own.

A new source is the same with `load(seed)`, as the protocol `examples.Source` says.

This package imports `core` only. The libraries that read a format are imported when a table of that format is read.
"""
