"""One validated configuration of a whole run."""
