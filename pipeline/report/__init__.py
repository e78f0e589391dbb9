"""Scores compared, and the page that shows them."""
