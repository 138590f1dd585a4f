"""Feed random bytes to the parsers, the settings and the search."""
