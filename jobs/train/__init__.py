"""Training: a plain single-process loop for now; the distributed entrypoint joins it here."""
