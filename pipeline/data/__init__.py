"""Images: the store they are written to, how they are split and augmented, and the sources they come from."""
