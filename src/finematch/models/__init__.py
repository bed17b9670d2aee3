"""The four papers: one file or folder each; they stand on `encoders`' interface and `losses`, never on one another."""
