"""Every ensemble by a quick probe, and how alike the backbones are."""
