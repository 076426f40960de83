"""What runs in the sandbox's own processes: zygote, judge, candidate. Not the worker's side."""
