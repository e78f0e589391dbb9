"""Compare the scores of models, and write the report page."""
