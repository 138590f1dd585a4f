"""Raise what each outside library can raise, at the calls of its door."""
