"""Read the queue, the index and the engine, and say what is wrong and what to do. Nothing here writes."""
