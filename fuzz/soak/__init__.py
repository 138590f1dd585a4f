"""Run the whole engine under a low descriptor limit for minutes or hours."""
