"""Sums of whole numbers that nobody can look into: members mask what they send, and only the sum over those who sent can be opened.

Sources: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017 (two masks a member,
drop-outs, consistency by signatures); Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020
(masks between neighbours in a graph). `member` says what a round promises, and to whom.
"""
