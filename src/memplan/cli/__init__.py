"""The command line: parses, calls, prints, sets the exit code."""

from memplan.cli.app import app, main

__all__ = ["app", "main"]
