"""What a run reports: FLOPs, throughput, metric files, progress bars, profiles."""
