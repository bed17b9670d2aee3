"""Evaluation protocols: one file and one entry function each; they see scores, never a method."""
