"""Files that a user provides in addition to the pool: targets, imported scores, word lists, hyperbolic embeddings."""
