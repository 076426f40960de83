"""Completion text to numbers. No torch, no Ray.

Start with `rewards.compose.Rewarder`.
"""
