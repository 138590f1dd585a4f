"""Damage each file below `.index` and compare the index with the tree."""
