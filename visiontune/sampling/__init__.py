"""Final sampling: the stock diffusers pipeline, in batches, resumable, with a manifest."""
