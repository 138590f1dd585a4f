"""What the operating system offers: files, locks, wake-ups, threads, limits."""
