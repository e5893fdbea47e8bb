"""Text: vocabularies, prepared data sets, batches."""
