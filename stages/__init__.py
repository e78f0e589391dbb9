"""One command per file, each a DVC stage or a tool: `python -m stages.<command>`."""
