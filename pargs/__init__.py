"""What several stages need, once: command lines, files of a run, encoding, models, scoring, training."""
