"""Pure functions: bytes in, entries and plans out."""
