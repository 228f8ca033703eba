"""Other ways to run a tableau: in parallel, backwards, with step-size control."""
