"""Files, paths, standard streams and signals: the interface to the operating system."""
