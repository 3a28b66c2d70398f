"""From images to pairs of augmented views: sources, order, decoding, and augmentation on CPU and device."""
