"""The one sealed way from stored images to a backbone's features; nothing else may call a backbone."""
