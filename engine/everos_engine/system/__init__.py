"""What the operating system gives us: files, locks, wake-ups, threads."""
