"""Files that a user brings besides the pool: targets, external scores, word lists, hyperbolic embeddings."""
