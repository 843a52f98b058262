"""report.html: a run's results on one page that opens from disk."""
