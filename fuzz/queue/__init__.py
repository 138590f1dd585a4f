"""Drive the change queue over real SQLite against a model."""
