"""The whole job of one federated fine-tuning, in fedloom and in the systems that a user would pick instead."""
