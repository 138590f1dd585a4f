"""Reads the queue, the index and the engine, and says what is wrong and what to do. Writes nothing."""
