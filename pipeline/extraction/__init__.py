"""Extraction: one pass of one frozen backbone over one dataset, into a feature store."""
