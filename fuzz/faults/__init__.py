"""Fail the n-th call of each door and compare the index with the tree."""
