"""From records on disk to packed batches: load, assign roles, tokenise, encode, batch."""
