"""Runs untrusted programs and judges them. No torch, no Ray, nothing of ours: the stdlib only.

Start with `sandbox.service.Sandbox`, or `python -m sandbox < cases.jsonl > results.jsonl`.
"""
