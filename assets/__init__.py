"""The nodes of the lineage graph, one module each; every module reads, calls `selection` once, and writes."""
