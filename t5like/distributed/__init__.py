"""Several processes as one run: how they were started, how they find each other, and how they wait and stop."""
