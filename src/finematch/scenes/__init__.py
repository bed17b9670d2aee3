"""The embedded set: generator, language, baselines."""
