"""A run's log files and checkpoints, how it resumes, and how it handles signals and trackers."""
