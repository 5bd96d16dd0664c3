"""Images in, images out: bias field, brain mask, static reference, rigid alignment."""
