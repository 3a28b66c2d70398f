"""Images in, pairs of augmented views out: sources, order, decoding, the CPU stage and the device stage."""
