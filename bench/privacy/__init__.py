"""What the measures of privacy cost and what they hold, each beside an oracle: `python -m bench.privacy`."""
