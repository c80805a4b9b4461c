"""Engines that compute shards in worker processes or on a Ray cluster, and the choice between them."""
