"""Evaluation of a label table against ground truth."""
