"""The processes: command line, daemon, evaluation, demo, feeds."""
