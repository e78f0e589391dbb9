"""Images: their store, how they are split and augmented, and the sources they come from."""
