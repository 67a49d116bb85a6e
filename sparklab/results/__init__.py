"""What came of a run: scores on held-out records, and base and tuned side by side."""
