"""Keeps a LanceDB index in step with a tree of markdown."""
