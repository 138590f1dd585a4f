"""Let several processes claim and record in one queue."""
