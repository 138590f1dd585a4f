"""The loops: one supervised Trio task each. They meet in the queue and in the values that the engine shares."""
