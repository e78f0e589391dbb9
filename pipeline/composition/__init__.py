"""Search over ensembles of backbones with quick probes, and measure how similar the backbones are."""
