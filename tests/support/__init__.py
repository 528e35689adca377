"""What tests share: tiny models, toys, simulated links, oracles. Nothing here is collected as a test."""
