"""One supervised Trio task each; they meet in the queue and in the shared values the engine passes in."""
