"""Count file descriptors under random operations over real LanceDB."""
