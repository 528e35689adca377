"""What a curious server can infer from the answers of a site: attacks on a start, an answer and the base model."""
