"""The science: bands, backbones, encoding, fusion, heads, search and scores. Knows neither DVC nor paths."""
