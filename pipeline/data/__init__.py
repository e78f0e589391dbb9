"""Images: their store, sources, splits and augmentation."""
