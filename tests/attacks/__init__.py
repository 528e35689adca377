"""Attacks on a deployment, each of which must fail, and must succeed where the limit that stops it is lifted."""
