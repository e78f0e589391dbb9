"""The engine: one pass of one backbone over one dataset, into the feature store, by one process or many."""
