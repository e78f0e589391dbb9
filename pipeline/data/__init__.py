"""The images store, which everything after `prepare` reads: chips and splits, writing, and the way back to a map."""
