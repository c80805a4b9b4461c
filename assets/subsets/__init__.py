"""Subsets and everything made from a version of one: lineage, reports, exports and the catalog."""
