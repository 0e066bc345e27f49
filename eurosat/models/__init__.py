"""Networks: made, loaded, exported and run."""
