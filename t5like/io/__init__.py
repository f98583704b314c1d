"""Files, paths, standard streams and signals: what the operating system gives a command."""
