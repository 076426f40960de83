"""What every room shares: records, errors, seeds, configuration, metrics. No torch, no Ray."""
