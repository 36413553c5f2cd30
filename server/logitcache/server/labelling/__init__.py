"""Labelling: a dataset through a teacher into a sealed label set, and what is settled or refused before it."""
