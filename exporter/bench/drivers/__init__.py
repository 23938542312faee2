"""How each peer is driven: modules that run in its own environment, and import nothing of ours but the protocol."""
