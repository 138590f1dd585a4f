"""Pure: bytes in, entries and plans out."""
