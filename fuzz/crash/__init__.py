"""Kill a real engine at random moments and compare its index with the tree."""
