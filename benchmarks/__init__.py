"""Speed claims, as ratios measured in one run; each module prints one JSON object as its last line."""
