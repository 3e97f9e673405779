"""Parse, call one run, print, exit code."""
