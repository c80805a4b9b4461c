"""The pool as assets: its samples, their embeddings, and the embeddings of target sets."""
