"""Drive the whole engine over a real tree against a model of what was written."""
