"""The feature store: a torch-free library over standard Zarr v3. The contract is in cache/README.md."""
